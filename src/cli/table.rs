//! Tables for people: columns as wide as their widest cell.

use super::terminal::{Colour, Paint};

/// A table under construction.
#[derive(Debug)]
pub(crate) struct Table<const N: usize> {
    rows: Vec<[Cell; N]>,
}

/// A cell; what is not coloured converts from text.
#[derive(Debug)]
pub(crate) struct Cell {
    text: String,
    colour: Option<Colour>,
}

impl Cell {
    pub(crate) fn coloured(text: impl Into<String>, colour: Colour) -> Self {
        Self { text: text.into(), colour: Some(colour) }
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self { text: text.into(), colour: None }
    }
}

impl<const N: usize> Table<N> {
    pub(crate) fn new(headers: [&str; N]) -> Self {
        Self { rows: vec![headers.map(|header| Cell::coloured(header, Colour::Dim))] }
    }

    pub(crate) fn row(&mut self, cells: [Cell; N]) {
        self.rows.push(cells);
    }

    /// The lines, each with its end.
    pub(crate) fn render(&self, paint: Paint) -> String {
        let widths: [usize; N] =
            std::array::from_fn(|column| self.rows.iter().map(|row| row[column].width()).max().unwrap_or(0));
        let mut text = String::new();
        for row in &self.rows {
            for (column, cell) in row.iter().enumerate() {
                text += &match cell.colour {
                    Some(colour) => paint.paint(colour, &cell.text),
                    None => cell.text.clone(),
                };
                if column + 1 < N {
                    text += &" ".repeat(widths[column] - cell.width() + 2);
                }
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_with_and_without_colours() {
        let mut table = Table::new(["NAME", "FOUND", "WHY"]);
        table.row([Cell::coloured("qemu-img", Colour::Red), "ä".into(), "".into()]);
        table.row(["x".into(), "7.2.22".into(), "for y".into()]);
        let plain = "NAME      FOUND   WHY\nqemu-img  ä\nx         7.2.22  for y\n";
        assert_eq!(table.render(Paint::never()), plain);
        let painted = table.render(Paint::always());
        assert!(painted.contains("\x1b[31mqemu-img\x1b[0m  ä\n"), "{painted:?}");
    }
}
