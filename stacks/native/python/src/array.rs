//! int32 memory of a batch, for whoever takes it: Python's buffer protocol and `DLPack`, without a copy.

use std::ffi::{CStr, c_int, c_void};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use stackbench_loader::{Data, dlpack};

const FORMAT: &CStr = c"i";
const PLAIN: &CStr = c"dltensor";
const VERSIONED: &CStr = c"dltensor_versioned";

/// int32 memory of a batch; `numpy.asarray`, `torch.from_dlpack` and `jax.dlpack.from_dlpack` take it as it is.
#[pyclass(frozen, module = "stackbench_native")]
pub struct Array {
    data: Data,
    shape: Box<[isize]>,
    strides: Box<[isize]>,
}

impl Array {
    pub fn new(data: Data, shape: &[usize]) -> Self {
        let strides = (0..shape.len()).map(|i| 4 * shape[i + 1..].iter().product::<usize>() as isize).collect();
        Self { data, shape: shape.iter().map(|n| *n as isize).collect(), strides }
    }

    /// Mapped shards are shared with whoever reads them next.
    fn read_only(&self) -> bool {
        matches!(self.data, Data::Mapped { .. })
    }

    fn shape_i64(&self) -> Vec<i64> {
        self.shape.iter().map(|n| *n as i64).collect()
    }
}

#[pymethods]
impl Array {
    /// `(batch, sequence + 1)`, or `(batch,)`.
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        pyo3::types::PyTuple::new(py, self.shape.iter())
    }

    /// A `NumPy` array of this memory.
    fn numpy<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("numpy")?.call_method1("asarray", (slf,))
    }

    /// A torch tensor of this memory.
    fn torch<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("torch")?.call_method1("from_dlpack", (slf,))
    }

    /// A JAX array of this memory.
    fn jax<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("jax.dlpack")?.call_method1("from_dlpack", (slf,))
    }

    #[expect(clippy::unused_self, reason = "Python calls it as a method")]
    fn __dlpack_device__(&self) -> (i32, i32) {
        (1, 0) // kDLCPU
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__(
        &self,
        py: Python<'_>,
        stream: Option<&Bound<'_, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(i32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        let _ = stream; // host memory has no stream
        if dl_device.is_some_and(|device| device != (1, 0)) {
            return Err(PyBufferError::new_err("this array is in host memory; valid: dl_device (1, 0)"));
        }
        let versioned = max_version.is_some_and(|version| version >= dlpack::VERSION);
        // A consumer of the old structure knows no read-only memory: it gets a copy of a mapped shard.
        let must_copy = copy == Some(true) || (self.read_only() && !versioned);
        if must_copy && copy == Some(false) {
            return Err(PyBufferError::new_err("read-only memory needs DLPack 1.0 or copy=None"));
        }
        let data = if must_copy { self.data.copied().map_err(crate::raise)? } else { self.data.clone() };
        let read_only = matches!(data, Data::Mapped { .. });
        let (pointer, name, destroy): (*mut c_void, &CStr, ffi::PyCapsule_Destructor) = if versioned {
            (dlpack::managed_versioned(&data, &self.shape_i64(), read_only).cast(), VERSIONED, drop_versioned)
        } else {
            (dlpack::managed(&data, &self.shape_i64()).cast(), PLAIN, drop_plain)
        };
        // SAFETY: pointer and name outlive the capsule; the destructor frees only what nobody took.
        unsafe { Bound::from_owned_ptr_or_err(py, ffi::PyCapsule_New(pointer, name.as_ptr(), Some(destroy))) }
            .map(Bound::unbind)
    }

    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        if view.is_null() || (this.read_only() && flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE) {
            return Err(PyBufferError::new_err("this memory is read-only"));
        }
        let numbers = this.data.as_slice();
        // SAFETY: `view` is the caller's to be filled; shape, strides and memory live as long as `slf`, which
        // the view holds.
        unsafe {
            (*view).buf = numbers.as_ptr().cast_mut().cast();
            (*view).len = 4 * numbers.len() as isize;
            (*view).readonly = c_int::from(this.read_only());
            (*view).itemsize = 4;
            (*view).format =
                if flags & ffi::PyBUF_FORMAT == 0 { std::ptr::null_mut() } else { FORMAT.as_ptr().cast_mut() };
            (*view).ndim = this.shape.len() as c_int;
            (*view).shape =
                if flags & ffi::PyBUF_ND == 0 { std::ptr::null_mut() } else { this.shape.as_ptr().cast_mut() };
            (*view).strides = if flags & ffi::PyBUF_STRIDES == ffi::PyBUF_STRIDES {
                this.strides.as_ptr().cast_mut()
            } else {
                std::ptr::null_mut()
            };
            (*view).suboffsets = std::ptr::null_mut();
            (*view).internal = std::ptr::null_mut();
            (*view).obj = slf.into_ptr();
        }
        Ok(())
    }

    fn __len__(&self) -> usize {
        self.shape[0] as usize
    }

    fn __repr__(&self) -> String {
        format!("Array(int32{:?})", self.shape)
    }

    #[pyo3(signature = (*args, **kwargs))]
    fn __array__<'py>(
        slf: &Bound<'py, Self>,
        args: &Bound<'py, pyo3::types::PyTuple>,
        kwargs: Option<&Bound<'py, PyDict>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let numpy = slf.py().import("numpy")?;
        let plain =
            numpy.call_method1("frombuffer", (slf, "int32"))?.call_method1("reshape", (slf.get().shape(slf.py())?,))?;
        if args.is_empty() && kwargs.is_none_or(PyDictMethods::is_empty) {
            return Ok(plain);
        }
        let args: Vec<Bound<'py, PyAny>> = std::iter::once(plain).chain(args.iter()).collect();
        numpy.call_method("array", pyo3::types::PyTuple::new(slf.py(), args)?, kwargs)
    }
}

unsafe extern "C" fn drop_plain(capsule: *mut ffi::PyObject) {
    // SAFETY: Python calls this once with our capsule; a consumer that took the tensor has renamed it.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, PLAIN.as_ptr()) == 1 {
            dlpack::delete(ffi::PyCapsule_GetPointer(capsule, PLAIN.as_ptr()).cast());
        }
    }
}

unsafe extern "C" fn drop_versioned(capsule: *mut ffi::PyObject) {
    // SAFETY: as above.
    unsafe {
        if ffi::PyCapsule_IsValid(capsule, VERSIONED.as_ptr()) == 1 {
            dlpack::delete_versioned(ffi::PyCapsule_GetPointer(capsule, VERSIONED.as_ptr()).cast());
        }
    }
}
