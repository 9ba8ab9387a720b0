//! A reader that gives no more than there is room for: for parsers of what others sent, which take it
//! into memory as they go.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// How much may still be read; whoever made it sets it again and again.
#[derive(Clone, Debug)]
pub(super) struct Room(Rc<Cell<u64>>);

impl Room {
    pub(super) fn of(bytes: u64) -> Self {
        Self(Rc::new(Cell::new(bytes)))
    }

    pub(super) fn set(&self, bytes: u64) {
        self.0.set(bytes);
    }

    pub(super) fn left(&self) -> u64 {
        self.0.get()
    }
}

pub(super) struct Gauge<R> {
    inner: R,
    room: Room,
}

impl<R> Gauge<R> {
    pub(super) fn new(inner: R, room: &Room) -> Self {
        Self { inner, room: room.clone() }
    }
}

impl<R: Read> Read for Gauge<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = self.inner.read(buffer)?;
        let left = self.room.left().checked_sub(size as u64);
        let too_large =
            || io::Error::new(io::ErrorKind::InvalidData, "a name or a header in it is too large");
        self.room.set(left.ok_or_else(too_large)?);
        Ok(size)
    }
}
