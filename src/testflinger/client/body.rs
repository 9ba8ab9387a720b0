//! A file as the one part of a multipart form, streamed.

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::Path;

pub(super) struct Form {
    boundary: String,
    file: File,
    size: u64,
}

impl Form {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let unique = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        // Longer and rarer than anything in a compressed archive.
        let boundary = format!("shakedown-{:016x}-{:016x}", unique.as_nanos(), std::process::id());
        Ok(Self { boundary, file, size })
    }

    pub(super) fn content_type(&self) -> String {
        format!("multipart/form-data; boundary={}", self.boundary)
    }

    fn head(&self) -> String {
        format!(
            "--{}\r\nContent-Disposition: form-data; name=\"file\"; filename=\"file\"\r\n\
             Content-Type: application/x-gzip\r\n\r\n",
            self.boundary
        )
    }

    fn tail(&self) -> String {
        format!("\r\n--{}--\r\n", self.boundary)
    }

    pub(super) fn len(&self) -> u64 {
        (self.head().len() + self.tail().len()) as u64 + self.size
    }

    pub(super) fn into_reader(self) -> impl Read + 'static {
        let (head, tail) = (Cursor::new(self.head()), Cursor::new(self.tail()));
        head.chain(self.file.take(self.size)).chain(tail)
    }
}
