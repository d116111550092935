"""What is compared. Every file reads alone and registers itself by defining `STACK`."""
