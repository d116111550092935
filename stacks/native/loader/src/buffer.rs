//! Batch memory: aligned to 64 bytes (JAX aliases no other), recycled when its last user lets go, and, where
//! asked for, registered with CUDA so that copies to a device need no staging.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use crate::error::{Error, Result};
use crate::sync::lock;

/// Alignment of every buffer, bytes.
pub const ALIGNMENT: usize = 64;

/// int32 memory of fixed length.
#[derive(Debug)]
pub struct Buffer {
    pointer: NonNull<i32>,
    length: usize,
    pinned: Option<Arc<Pinning>>,
}

// SAFETY: a Buffer owns its memory, and gives it out by the rules of `&` and `&mut`.
unsafe impl Send for Buffer {}
// SAFETY: as above: shared use is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    fn new(length: usize, pinning: Option<&Arc<Pinning>>) -> Result<Self> {
        let layout = Self::layout(length);
        // SAFETY: the layout has a size above zero.
        #[expect(clippy::cast_ptr_alignment, reason = "the layout asks for more than an i32 needs")]
        let raw = unsafe { alloc_zeroed(layout) }.cast::<i32>();
        let Some(pointer) = NonNull::new(raw) else {
            return Err(Error::input(format!("no memory for a batch of {} bytes", layout.size())));
        };
        let mut buffer = Self { pointer, length, pinned: None };
        if let Some(pinning) = pinning {
            pinning.register(&buffer)?;
            buffer.pinned = Some(pinning.clone());
        }
        Ok(buffer)
    }

    fn layout(length: usize) -> Layout {
        Layout::from_size_align(4 * length.max(1), ALIGNMENT).expect("a batch fits into memory")
    }

    /// Its numbers.
    pub fn as_slice(&self) -> &[i32] {
        // SAFETY: the memory is ours, initialised, and `length` long.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.length) }
    }

    /// Its numbers, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [i32] {
        // SAFETY: as above, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.length) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(pinning) = self.pinned.take() {
            pinning.unregister(self);
        }
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.pointer.as_ptr().cast(), Self::layout(self.length)) };
    }
}

/// Buffers of one size that wait to be used again.
#[derive(Debug)]
pub struct Pool {
    length: usize,
    most: usize,
    free: Mutex<Vec<Buffer>>,
    pinning: Option<Arc<Pinning>>,
}

impl Pool {
    /// Buffers of `length` numbers, of which at most `most` wait.
    pub fn new(length: usize, most: usize, pinning: Option<Arc<Pinning>>) -> Arc<Self> {
        Arc::new(Self { length, most, free: Mutex::new(Vec::new()), pinning })
    }

    /// A buffer with arbitrary content.
    pub fn take(self: &Arc<Self>) -> Result<Lease> {
        let waiting = lock(&self.free).pop();
        let buffer = match waiting {
            Some(buffer) => buffer,
            None => Buffer::new(self.length, self.pinning.as_ref())?,
        };
        Ok(Lease { buffer: Some(buffer), pool: self.clone() })
    }
}

/// A buffer that goes back to its pool.
#[derive(Debug)]
pub struct Lease {
    buffer: Option<Buffer>,
    pool: Arc<Pool>,
}

impl Lease {
    /// Its numbers.
    pub fn as_slice(&self) -> &[i32] {
        self.buffer.as_ref().map_or(&[], Buffer::as_slice) // there until it is dropped
    }

    /// Its numbers, to be written.
    pub fn as_mut_slice(&mut self) -> &mut [i32] {
        self.buffer.as_mut().map_or(&mut [], Buffer::as_mut_slice)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(buffer) = self.buffer.take() else { return };
        let mut free = lock(&self.pool.free);
        if free.len() < self.pool.most {
            free.push(buffer);
        }
    }
}

type HostRegister = unsafe extern "C" fn(*mut libc::c_void, usize, libc::c_uint) -> libc::c_int;
type HostUnregister = unsafe extern "C" fn(*mut libc::c_void) -> libc::c_int;

/// CUDA's runtime, for `cudaHostRegister`.
#[derive(Debug)]
pub struct Pinning {
    library: libloading::Library,
}

/// Names under which the CUDA runtime is looked for.
const RUNTIMES: [&str; 3] = ["libcudart.so.13", "libcudart.so.12", "libcudart.so"];

impl Pinning {
    /// The CUDA runtime at `path`, or where the loader finds one.
    pub fn open(path: Option<&str>) -> Result<Arc<Self>> {
        let names = path.map_or(RUNTIMES.to_vec(), |path| vec![path]);
        for name in &names {
            // SAFETY: CUDA's runtime has no initialiser that relies on the state of this process.
            if let Ok(library) = unsafe { libloading::Library::new(name) } {
                return Ok(Arc::new(Self { library }));
            }
        }
        Err(Error::input(format!(
            "pinned memory needs the CUDA runtime, and none was found ({}); valid: pinned=False, or the path of \
             libcudart.so",
            names.join(", ")
        )))
    }

    fn register(&self, buffer: &Buffer) -> Result<()> {
        // SAFETY: the symbol has this type in every CUDA runtime; memory and length are the buffer's.
        let code = unsafe {
            let register: libloading::Symbol<'_, HostRegister> =
                self.library.get(b"cudaHostRegister\0").map_err(|e| Error::input(format!("no CUDA runtime: {e}")))?;
            register(buffer.pointer.as_ptr().cast(), 4 * buffer.length, 0)
        };
        if code == 0 {
            Ok(())
        } else {
            Err(Error::input(format!("cudaHostRegister: CUDA error {code}; valid: pinned=False")))
        }
    }

    fn unregister(&self, buffer: &Buffer) {
        // SAFETY: as above; the buffer was registered when it was made.
        unsafe {
            if let Ok(unregister) = self.library.get::<HostUnregister>(b"cudaHostUnregister\0") {
                unregister(buffer.pointer.as_ptr().cast());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_used_again() {
        let pool = Pool::new(33, 1, None);
        let mut first = pool.take().unwrap();
        first.as_mut_slice().fill(7);
        let address = first.as_slice().as_ptr() as usize;
        assert_eq!(address % ALIGNMENT, 0);
        let second = pool.take().unwrap();
        assert_ne!(address, second.as_slice().as_ptr() as usize);
        drop(first);
        drop(second); // the pool keeps one
        assert_eq!(pool.free.lock().unwrap().len(), 1);
        assert_eq!(pool.take().unwrap().as_slice().as_ptr() as usize, address);
    }

    #[test]
    fn no_runtime_is_an_error_with_its_reason() {
        let error = Pinning::open(Some("libno-such-runtime.so")).unwrap_err();
        assert!(error.message.contains("libno-such-runtime.so"));
    }
}
