//! Parquet: row groups of one string column, read a segment at a time.

use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use bytes::{Buf, Bytes};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{ChunkReader, Length};

use crate::error::{Error, Result};
use crate::store::File;
use crate::sync::lock;

const MOST_ROWS: u64 = 1 << 31;
const WINDOW: usize = 1 << 20;
const CHUNK: usize = 8 << 10; // page headers are read this way; the pages themselves come through `get_bytes`

/// A file as the Parquet reader sees it; it remembers our own error, which the reader turns into text.
#[derive(Clone, Debug)]
pub struct Watched {
    file: File,
    failed: Arc<Mutex<Option<Error>>>,
    /// What a store gave last, and from where: pages are small, and requests slow.
    window: Arc<Mutex<(u64, Bytes)>>,
}

impl Watched {
    fn new(file: File) -> Self {
        Self { file, failed: Arc::default(), window: Arc::default() }
    }

    fn read(&self, start: u64, length: usize) -> Result<Bytes> {
        let bytes =
            if self.file.is_remote() { self.through_window(start, length) } else { self.file.read(start, length) };
        if let Err(error) = &bytes {
            lock(&self.failed).get_or_insert_with(|| error.clone());
        }
        bytes
    }

    /// Calls the reader, which panics on some damaged files.
    fn guarded<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(self.wrong(&said.unwrap_or("its reader panicked")))
        })
    }

    fn through_window(&self, start: u64, length: usize) -> Result<Bytes> {
        let mut window = lock(&self.window);
        let within =
            start.checked_sub(window.0).map(|at| at as usize).filter(|at| at.saturating_add(length) <= window.1.len());
        if let Some(at) = within {
            return Ok(window.1.slice(at..at + length));
        }
        let wanted = length.max(WINDOW).min(self.file.size().saturating_sub(start) as usize).max(length);
        *window = (start, self.file.read(start, wanted)?);
        Ok(window.1.slice(..length))
    }

    /// Why reading failed: the file, or what is in it.
    fn wrong(&self, error: &dyn std::fmt::Display) -> Error {
        let ours = lock(&self.failed).clone();
        ours.unwrap_or_else(|| Error::data(format!("not Parquet that can be read: {error}"))).in_file(self.file.name())
    }
}

impl Length for Watched {
    fn len(&self) -> u64 {
        self.file.size()
    }
}

impl ChunkReader for Watched {
    type T = HeaderReader;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(HeaderReader { file: self.clone(), position: start, bytes: Bytes::new() })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        self.read(start, length).map_err(|error| ParquetError::External(Box::new(error)))
    }
}

/// A file from a position on, in small pieces.
#[derive(Debug)]
pub struct HeaderReader {
    file: Watched,
    position: u64,
    bytes: Bytes,
}

impl Read for HeaderReader {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.bytes.is_empty() {
            let length = (self.file.len().saturating_sub(self.position) as usize).min(CHUNK);
            self.bytes = self.file.read(self.position, length).map_err(std::io::Error::other)?;
            self.position += length as u64;
        }
        let count = out.len().min(self.bytes.len());
        self.bytes.copy_to_slice(&mut out[..count]);
        Ok(count)
    }
}

fn builder(file: &Watched, field: &str) -> Result<(ParquetRecordBatchReaderBuilder<Watched>, usize)> {
    let name = file.file.name();
    let builder = ParquetRecordBatchReaderBuilder::try_new(file.clone()).map_err(|e| file.wrong(&e))?;
    let schema = builder.parquet_schema();
    let index = schema.columns().iter().position(|column| column.path().string() == field);
    let Some(index) = index else {
        let have: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
        let message = format!("no column {field:?}; valid: {}", have.join(", "));
        return Err(Error::input(message).in_file(name));
    };
    let kind = builder.schema().field_with_name(field).map(|f| f.data_type().clone());
    match kind {
        Ok(DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => Ok((builder, index)),
        Ok(other) => Err(Error::input(format!("column {field:?} holds {other}, not text")).in_file(name)),
        Err(error) => Err(Error::input(error.to_string()).in_file(name)),
    }
}

/// (rows, bytes of the text column) of each row group, from the footer.
pub fn groups(file: File, field: &str) -> Result<Vec<(u64, u64)>> {
    let file = Watched::new(file);
    file.guarded(|| read_groups(&file, field))
}

fn read_groups(file: &Watched, field: &str) -> Result<Vec<(u64, u64)>> {
    let (builder, column) = builder(file, field)?;
    let groups = builder.metadata().row_groups().iter().enumerate();
    groups
        .map(|(number, group)| {
            let sizes = (group.num_rows(), group.column(column).uncompressed_size());
            match (u64::try_from(sizes.0), u64::try_from(sizes.1)) {
                (Ok(rows), Ok(bytes)) if rows <= MOST_ROWS => Ok((rows, bytes)),
                _ => Err(file.wrong(&format!("{sizes:?} rows and bytes")).at(format!("row group {number}"))),
            }
        })
        .collect()
}

/// One row group, a segment of rows at a time.
#[derive(Debug)]
pub struct GroupReader {
    file: Watched,
    group: usize,
    row: u64,
    rows: u64,
    reader: ParquetRecordBatchReader,
}

impl GroupReader {
    /// From the first row of segment `segment` on, `rows` a segment.
    pub fn open(file: File, field: &str, group: usize, rows: u64, segment: u64) -> Result<Self> {
        let file = Watched::new(file);
        file.guarded(|| Self::open_rows(&file, field, group, rows, segment))
    }

    fn open_rows(file: &Watched, field: &str, group: usize, rows: u64, segment: u64) -> Result<Self> {
        let (builder, column) = builder(file, field)?;
        let place = format!("row group {group}");
        if group >= builder.metadata().num_row_groups() {
            return Err(file.wrong(&"there is no such row group").at(place));
        }
        let mask = ProjectionMask::leaves(builder.parquet_schema(), [column]);
        let row = rows.saturating_mul(segment);
        let all = u64::try_from(builder.metadata().row_group(group).num_rows()).unwrap_or(0);
        let reader = builder
            .with_projection(mask)
            .with_row_groups(vec![group])
            .with_batch_size(rows as usize)
            .with_offset(row as usize)
            .build()
            .map_err(|e| file.wrong(&e).at(place))?;
        Ok(Self { file: file.clone(), group, row, rows: all, reader })
    }

    /// The rows of the next segment; None after the last.
    pub fn next(&mut self) -> Result<Option<RecordBatch>> {
        let reader = &mut self.reader;
        let next = self.file.guarded(|| Ok(reader.next()));
        let place = |group| format!("row group {group}, rows from {}", self.row);
        match next.map_err(|e| e.at(place(self.group)))? {
            None if self.row >= self.rows => Ok(None),
            None => {
                let message = format!("it has {} rows, and its footer says {}", self.row, self.rows);
                self.rows = 0; // said once
                Err(self.file.wrong(&message).at(format!("row group {}", self.group)))
            }
            Some(Ok(batch)) => {
                self.row += batch.num_rows() as u64;
                Ok(Some(batch))
            }
            Some(Err(error)) => Err(self.file.wrong(&error).at(place(self.group))),
        }
    }
}

/// Text of each row; None where it is null.
pub fn texts(batch: &RecordBatch) -> Vec<Option<&str>> {
    let column = batch.column(0);
    match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().iter().collect(),
        DataType::LargeUtf8 => column.as_string::<i64>().iter().collect(),
        DataType::Utf8View => column.as_string_view().iter().collect(),
        other => unreachable!("checked when the file was opened: {other}"),
    }
}
