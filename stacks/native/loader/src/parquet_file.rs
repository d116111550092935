//! Parquet: row groups of one string column, read a segment at a time.

use std::io::Read;

use arrow_array::cast::AsArray;
use arrow_array::{Array, RecordBatch};
use arrow_schema::DataType;
use bytes::{Buf, Bytes};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::errors::Result as ParquetResult;
use parquet::file::reader::ChunkReader;

use crate::error::{Error, Result};
use crate::store::File;

const CHUNK: usize = 8 << 10; // page headers are read this way; the pages themselves come through `get_bytes`

impl ChunkReader for File {
    type T = HeaderReader;

    fn get_read(&self, start: u64) -> ParquetResult<Self::T> {
        Ok(HeaderReader { file: self.clone(), position: start, bytes: Bytes::new() })
    }

    fn get_bytes(&self, start: u64, length: usize) -> ParquetResult<Bytes> {
        self.read(start, length).map_err(|error| parquet::errors::ParquetError::External(Box::new(error)))
    }
}

/// A file from a position on, in small pieces.
#[derive(Debug)]
pub struct HeaderReader {
    file: File,
    position: u64,
    bytes: Bytes,
}

impl Read for HeaderReader {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        if self.bytes.is_empty() {
            let length = (self.file.size().saturating_sub(self.position) as usize).min(CHUNK);
            self.bytes = self.file.read(self.position, length).map_err(std::io::Error::other)?;
            self.position += length as u64;
        }
        let count = out.len().min(self.bytes.len());
        self.bytes.copy_to_slice(&mut out[..count]);
        Ok(count)
    }
}

fn wrong(name: &str, error: &parquet::errors::ParquetError) -> Error {
    if let parquet::errors::ParquetError::External(inner) = error
        && let Some(ours) = inner.downcast_ref::<Error>()
    {
        return ours.clone().in_file(name);
    }
    Error::data(format!("not Parquet that can be read: {error}")).in_file(name)
}

fn builder(file: File, field: &str) -> Result<(ParquetRecordBatchReaderBuilder<File>, usize)> {
    let name = file.name().to_owned();
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| wrong(&name, &e))?;
    let schema = builder.parquet_schema();
    let index = schema.columns().iter().position(|column| column.path().string() == field);
    let Some(index) = index else {
        let have: Vec<String> = schema.columns().iter().map(|c| c.path().string()).collect();
        let message = format!("no column {field:?}; valid: {}", have.join(", "));
        return Err(Error::input(message).in_file(&name));
    };
    let kind = builder.schema().field_with_name(field).map(|f| f.data_type().clone());
    match kind {
        Ok(DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => Ok((builder, index)),
        other => Err(Error::input(format!("column {field:?} holds {other:?}, not text")).in_file(&name)),
    }
}

/// (rows, bytes of the text column) of each row group, from the footer.
pub fn groups(file: File, field: &str) -> Result<Vec<(u64, u64)>> {
    let (builder, column) = builder(file, field)?;
    Ok(builder
        .metadata()
        .row_groups()
        .iter()
        .map(|group| (group.num_rows() as u64, group.column(column).uncompressed_size() as u64))
        .collect())
}

/// One row group, a segment of rows at a time.
#[derive(Debug)]
pub struct GroupReader {
    name: String,
    group: usize,
    row: u64,
    reader: ParquetRecordBatchReader,
}

impl GroupReader {
    /// From the first row of segment `segment` on, `rows` a segment.
    pub fn open(file: File, field: &str, group: usize, rows: u64, segment: u64) -> Result<Self> {
        let name = file.name().to_owned();
        let (builder, column) = builder(file, field)?;
        let mask = ProjectionMask::leaves(builder.parquet_schema(), [column]);
        let reader = builder
            .with_projection(mask)
            .with_row_groups(vec![group])
            .with_batch_size(rows as usize)
            .with_offset((rows * segment) as usize)
            .build()
            .map_err(|e| wrong(&name, &e).at(format!("row group {group}")))?;
        Ok(Self { name, group, row: rows * segment, reader })
    }

    /// The rows of the next segment; None after the last.
    pub fn next(&mut self) -> Result<Option<RecordBatch>> {
        let place = format!("row group {}, rows from {}", self.group, self.row);
        match self.reader.next() {
            None => Ok(None),
            Some(Ok(batch)) => {
                self.row += batch.num_rows() as u64;
                Ok(Some(batch))
            }
            Some(Err(error)) => {
                Err(Error::data(format!("not Parquet that can be read: {error}")).in_file(&self.name).at(place))
            }
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
