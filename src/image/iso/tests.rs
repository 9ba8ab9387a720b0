use super::*;
use proptest::prelude::*;
use std::io::Cursor;

const S: usize = SECTOR as usize;

/// A small image: `/live/vmlinuz` with Rock Ridge names, and both boot entries.
fn image() -> Vec<u8> {
    let mut image = vec![0; 32 * S];
    let sectors = 32_u32;
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16 * S, b"\x01CD001\x01");
    put(16 * S + 40, format!("{:32}", "SHAKEDOWN").as_bytes());
    put(16 * S + 80, &sectors.to_le_bytes());
    put(16 * S + 128, &2048_u16.to_le_bytes());
    put(16 * S + 156, &record(20, S as u32, true, b"\0", b""));
    put(17 * S, b"\0CD001\x01EL TORITO SPECIFICATION");
    put(17 * S + 71, &19_u32.to_le_bytes());
    put(18 * S, b"\xffCD001\x01");
    put(19 * S, &validation());
    put(19 * S + 32, &boot(0x88, 24, 4));
    put(19 * S + 64, &[0x91, 0xef, 1, 0]);
    put(19 * S + 96, &boot(0x88, 25, 0));
    let mut root = record(20, S as u32, true, b"\0", b"");
    root.extend(record(20, S as u32, true, b"\x01", b""));
    root.extend(record(21, S as u32, true, b"LIVE", &name("live")));
    put(20 * S, &root);
    let mut live = record(22, 7, false, b"VMLINUZ.;1", &name("vmlinuz"));
    live.extend(record(23, 5, false, b"PLAIN.TXT;1", b""));
    put(21 * S, &live);
    image
}

fn record(block: u32, bytes: u32, directory: bool, name: &[u8], system_use: &[u8]) -> Vec<u8> {
    let mut record = vec![0; 33];
    record[2..6].copy_from_slice(&block.to_le_bytes());
    record[10..14].copy_from_slice(&bytes.to_le_bytes());
    record[25] = if directory { 2 } else { 0 };
    record[32] = u8::try_from(name.len()).expect("short");
    record.extend(name);
    if record.len() % 2 == 1 {
        record.push(0);
    }
    record.extend(system_use);
    record[0] = u8::try_from(record.len()).expect("short");
    record
}

fn name(name: &str) -> Vec<u8> {
    let mut field = vec![b'N', b'M', u8::try_from(5 + name.len()).expect("short"), 1, 0];
    field.extend(name.as_bytes());
    if field.len() % 2 == 1 {
        field.push(0);
    }
    field
}

fn validation() -> [u8; 32] {
    let mut entry = [0; 32];
    entry[0] = 1;
    entry[30..].copy_from_slice(&[0x55, 0xaa]);
    let sum =
        entry.chunks(2).fold(0_u16, |sum, word| sum.wrapping_add(u16::from_le_bytes([word[0], word[1]])));
    entry[28..30].copy_from_slice(&0_u16.wrapping_sub(sum).to_le_bytes());
    entry
}

fn boot(indicator: u8, block: u32, sectors: u16) -> [u8; 32] {
    let mut entry = [0; 32];
    entry[0] = indicator;
    entry[6..8].copy_from_slice(&sectors.to_le_bytes());
    entry[8..12].copy_from_slice(&block.to_le_bytes());
    entry
}

fn open(image: Vec<u8>) -> Result<Iso<Cursor<Vec<u8>>>> {
    Iso::new(Cursor::new(image))
}

/// All that can be asked, so that all code sees the damage.
fn everything(image: Vec<u8>) -> Result<()> {
    let mut iso = open(image)?;
    iso.boot_entries()?;
    for path in ["live/vmlinuz", "live/plain.txt", "no/such/file"] {
        iso.find(path)?;
    }
    Ok(())
}

#[test]
fn boot_entries_and_files_are_found() {
    let mut iso = open(image()).expect("opens");
    assert_eq!(iso.volume_id, "SHAKEDOWN");
    let entries = iso.boot_entries().expect("reads");
    let s = SECTOR;
    assert_eq!(
        entries,
        [
            BootEntry { platform: Platform::Bios, image: 24 * s..25 * s },
            BootEntry { platform: Platform::Efi, image: 25 * s..25 * s + 512 },
        ]
    );
    let kernel = Extent { offset: 22 * s, bytes: 7, directory: false };
    assert_eq!(iso.find("live/vmlinuz").expect("reads"), Some(kernel));
    assert_eq!(iso.find("/live/vmlinuz").expect("reads"), Some(kernel));
    assert!(iso.find("live/plain.txt").expect("reads").is_some(), "by its plain name");
    assert!(iso.find("live").expect("reads").is_some_and(|extent| extent.directory));
    for missing in ["live/VMLINUZ", "vmlinuz", "live/vmlinuz/x", "live/initrd"] {
        assert_eq!(iso.find(missing).expect("reads"), None, "{missing}");
    }
}

#[test]
fn each_damage_has_its_words() {
    type Damage = fn(&mut Vec<u8>);
    let damages: [(Damage, &str); 9] = [
        (|i| i.truncate(31 * S), "truncated: the volume ends at byte 65536, the file at byte 63488"),
        (|i| i.truncate(100), "no `CD001`"),
        (|i| i[16 * S + 1] = b'X', "no `CD001`"),
        (|i| i[18 * S + 1] = b'X', "descriptors have no end"),
        (|i| i[16 * S + 129] = 2, "logical blocks have 512 bytes"),
        (|i| i[17 * S + 71] = 200, "the boot catalog ends at"),
        (|i| i[19 * S + 30] = 0, "no valid first entry"),
        (|i| i[19 * S + 32 + 8] = 100, "the boot image for Bios ends at"),
        (|i| i[20 * S] = 20, "impossible length"),
    ];
    for (damage, words) in damages {
        let mut image = image();
        damage(&mut image);
        let text = everything(image).expect_err(words).to_string();
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn an_image_of_data_has_no_boot_entries() {
    let mut image = image();
    image.copy_within(18 * S..19 * S, 17 * S);
    assert_eq!(open(image).expect("opens").boot_entries().expect("reads"), []);
}

proptest! {
    #[test]
    fn mutations_neither_panic_nor_loop(changes in prop::collection::vec((16 * S..24 * S, any::<u8>()), 1..40)) {
        let mut image = image();
        for (at, byte) in changes {
            image[at] = byte;
        }
        let _ = everything(image);
    }

    #[test]
    fn damaged_structures_neither_panic_nor_loop(
        changes in prop::collection::vec((prop::sample::select(vec![16 * S + 80, 16 * S + 156, 17 * S + 71, 19 * S, 19 * S + 32, 20 * S, 20 * S + 68, 21 * S]), 0..48_usize, any::<u8>()), 1..12),
        length in 16 * S..33 * S,
    ) {
        let mut image = image();
        for (base, at, byte) in changes {
            image[base + at] = byte;
        }
        image.truncate(length);
        let _ = everything(image);
    }

    #[test]
    fn arbitrary_system_use_is_survived(system_use in prop::collection::vec(any::<u8>(), 0..180)) {
        let mut image = image();
        let record = record(22, 7, false, b"X", &system_use);
        image[21 * S..21 * S + record.len()].copy_from_slice(&record);
        let _ = everything(image);
    }
}
