//! What is on the screen, as text, while the machine is in VGA text mode.
//!
//! Firmware, boot loaders and panics write there before any console exists. Read from the text
//! buffer at 0xB8000: 25 rows of 80 cells, each a character in code page 437 and an attribute.

use super::qmp::Qmp;
use crate::deadline::Deadline;
use crate::fault::Fault;
use anyhow::{Context, Result};
use qapi::qmp;
use std::path::Path;

const BUFFER: u64 = 0xB_8000;
const COLUMNS: usize = 80;
const ROWS: usize = 25;
const CELL: usize = 2;

/// Reads the screen; `scratch` holds a file for the moment.
pub(super) fn text(qmp: &mut Qmp, scratch: &Path, deadline: &Deadline) -> Result<String> {
    let file = scratch.join("vga-text");
    let command = qmp::pmemsave {
        val: BUFFER,
        size: (COLUMNS * ROWS * CELL) as u64,
        filename: file.to_string_lossy().into_owned(),
    };
    qmp.execute(&command, deadline).context(Fault::host("QEMU cannot read the screen"))?;
    let cells =
        std::fs::read(&file).with_context(|| Fault::host(format!("cannot read {}", file.display())))?;
    Ok(decode(&cells))
}

/// Rows without trailing blanks. Beyond ASCII only the shape of a text matters: a dot.
fn decode(cells: &[u8]) -> String {
    let rows = cells.chunks(COLUMNS * CELL).map(|row| {
        let row: String = row
            .chunks(CELL)
            .map(|cell| match cell[0] {
                0 => ' ',
                c @ b' '..=b'~' => char::from(c),
                _ => '.',
            })
            .collect();
        row.trim_end().to_owned()
    });
    rows.collect::<Vec<_>>().join("\n").trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_become_rows() {
        let mut cells = vec![0; COLUMNS * ROWS * CELL];
        for (index, byte) in b"GNU GRUB \xda".iter().enumerate() {
            cells[COLUMNS * CELL + index * CELL] = *byte;
            cells[COLUMNS * CELL + index * CELL + 1] = 0x07;
        }
        assert_eq!(decode(&cells), "\nGNU GRUB .");
    }
}
