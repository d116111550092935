//! `DLPack`'s C structures (dmlc/dlpack, version 1.0), for int32 host memory.

use std::ffi::c_void;

use crate::pack::Data;

/// Version of the structures below.
pub const VERSION: (u32, u32) = (1, 0);
const CPU: i32 = 1;
const SIGNED_INTEGER: u8 = 0;
const READ_ONLY: u64 = 1;

#[repr(C)]
struct Device {
    kind: i32,
    id: i32,
}

#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    ndim: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// `DLManagedTensor`: what a capsule named `dltensor` points to.
#[repr(C)]
pub struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut Managed)>,
}

/// `DLManagedTensorVersioned`: what a capsule named `dltensor_versioned` points to.
#[repr(C)]
pub struct ManagedVersioned {
    version: (u32, u32),
    context: *mut c_void,
    deleter: Option<unsafe extern "C" fn(*mut ManagedVersioned)>,
    flags: u64,
    tensor: Tensor,
}

/// What a tensor keeps alive.
struct Held {
    _data: Data,
    shape: Vec<i64>,
    strides: Vec<i64>,
}

fn hold(data: &Data, shape: &[i64]) -> (Tensor, *mut c_void) {
    let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().product()).collect();
    let mut held = Box::new(Held { _data: data.clone(), shape: shape.to_vec(), strides });
    let tensor = Tensor {
        data: data.as_slice().as_ptr().cast_mut().cast(),
        device: Device { kind: CPU, id: 0 },
        ndim: shape.len() as i32,
        dtype: DataType { code: SIGNED_INTEGER, bits: 32, lanes: 1 },
        shape: held.shape.as_mut_ptr(),
        strides: held.strides.as_mut_ptr(),
        byte_offset: 0,
    };
    (tensor, Box::into_raw(held).cast())
}

/// A tensor of writable memory, or of memory that the consumer promises to leave alone.
pub fn managed(data: &Data, shape: &[i64]) -> *mut Managed {
    unsafe extern "C" fn delete(this: *mut Managed) {
        // SAFETY: made by `managed` below, and deleted once, as DLPack demands.
        unsafe {
            let this = Box::from_raw(this);
            drop(Box::from_raw(this.context.cast::<Held>()));
        }
    }
    let (tensor, context) = hold(data, shape);
    Box::into_raw(Box::new(Managed { tensor, context, deleter: Some(delete) }))
}

/// The same with a version, and with a flag where the memory must not be written.
pub fn managed_versioned(data: &Data, shape: &[i64], read_only: bool) -> *mut ManagedVersioned {
    unsafe extern "C" fn delete(this: *mut ManagedVersioned) {
        // SAFETY: made by `managed_versioned` below, and deleted once, as DLPack demands.
        unsafe {
            let this = Box::from_raw(this);
            drop(Box::from_raw(this.context.cast::<Held>()));
        }
    }
    let (tensor, context) = hold(data, shape);
    let flags = if read_only { READ_ONLY } else { 0 };
    Box::into_raw(Box::new(ManagedVersioned { version: VERSION, context, deleter: Some(delete), flags, tensor }))
}

/// Frees a tensor that no consumer took.
///
/// # Safety
/// `tensor` was made by `managed`, and nobody has called its deleter.
pub unsafe fn delete(tensor: *mut Managed) {
    // SAFETY: by the caller's promise the tensor is whole.
    unsafe {
        if let Some(deleter) = (*tensor).deleter {
            deleter(tensor);
        }
    }
}

/// Frees a tensor that no consumer took.
///
/// # Safety
/// `tensor` was made by `managed_versioned`, and nobody has called its deleter.
pub unsafe fn delete_versioned(tensor: *mut ManagedVersioned) {
    // SAFETY: by the caller's promise the tensor is whole.
    unsafe {
        if let Some(deleter) = (*tensor).deleter {
            deleter(tensor);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::buffer::Pool;

    #[test]
    fn a_tensor_keeps_its_memory_until_it_is_deleted() {
        let pool = Pool::new(6, 1, None);
        let mut lease = pool.take().unwrap();
        lease.as_mut_slice().copy_from_slice(&[1, 2, 3, 4, 5, 6]);
        let data = Data::Pooled(Arc::new(lease));
        let (plain, versioned) = (managed(&data, &[2, 3]), managed_versioned(&data, &[2, 3], true));
        drop(data);
        // SAFETY: both tensors were made above, are read while alive, and are deleted once.
        unsafe {
            let tensor = &(*plain).tensor;
            assert_eq!(std::slice::from_raw_parts(tensor.data.cast::<i32>(), 6), [1, 2, 3, 4, 5, 6]);
            assert_eq!(std::slice::from_raw_parts(tensor.strides, 2), [3, 1]);
            delete(plain);
            assert_eq!((*versioned).flags, READ_ONLY);
            assert_eq!(*(*versioned).tensor.data.cast::<i32>().add(5), 6);
            delete_versioned(versioned);
        }
    }
}
