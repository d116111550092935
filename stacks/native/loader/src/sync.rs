//! A lock that a panic elsewhere does not spoil: what it guards here is whole at every step.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks, whoever panicked before.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
