use super::*;
use std::time::Duration;

fn deadline() -> Deadline {
    Deadline::after(Duration::from_secs(60), "test")
}

fn disk() -> Vec<u8> {
    let mut disk = vec![0; 1024];
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

/// The beginning of a version 3 image with 64 KiB clusters, and a file as long as its tables say.
fn qcow2_image(change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut image = vec![0; 4 << 16];
    image[..4].copy_from_slice(b"QFI\xfb");
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(4, &3_u32.to_be_bytes());
    put(20, &16_u32.to_be_bytes());
    put(24, &(1_u64 << 30).to_be_bytes());
    put(36, &2_u32.to_be_bytes());
    put(40, &(3_u64 << 16).to_be_bytes());
    put(48, &(1_u64 << 16).to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    change(&mut image);
    image
}

fn open_with(content: &[u8], description: Option<&str>) -> Result<Image> {
    let dir = tempfile::tempdir().expect("temp dir");
    let file = dir.path().join("image");
    fs::write(&file, content).expect("written");
    fs::write(dir.path().join("secret"), "from a file\n").expect("written");
    if let Some(description) = description {
        fs::write(dir.path().join("image.toml"), description).expect("written");
    }
    open("image", &file, &Table::new(), dir.path(), &dir.path().join("digests"), &deadline())
}

fn error(content: &[u8], description: Option<&str>) -> String {
    format!("{:#}", open_with(content, description).expect_err("is refused"))
}

#[test]
fn the_format_is_that_of_the_content() {
    let image = open_with(&disk(), None).expect("a disk");
    assert_eq!((image.format, image.key), (ImageFormat::Raw, KeyEntry::Smbios));
    assert!(image.login.is_some() && image.digest.starts_with("sha256:"));
    assert_eq!(open_with(&qcow2_image(|_| {}), None).expect("a qcow2").format, ImageFormat::Qcow2);
    for (content, words) in [
        (&b""[..], "it is empty"),
        (b"\x1f\x8b\x08 and so on", "gzip"),
        (b"\xfd7zXZ\0 and so on", "xz"),
        (b"KDMV", "VMDK"),
        (b"<html>Not Found</html>", "text"),
        (&[0; 2048], "zeros"),
        (&[0x80; 2048], "something unknown"),
    ] {
        let text = error(content, None);
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn a_qcow2_that_refers_to_other_files_or_is_broken_is_refused() {
    let refused = |change: fn(&mut [u8]), words: &str| {
        let text = error(&qcow2_image(change), None);
        assert!(text.contains(words), "{text}");
    };
    refused(|image| image[15] = 104, "backing file");
    refused(|image| image[79] = 0b100, "in another file");
    refused(|image| image[79] = 0b10, "qemu-img check");
    refused(|image| image[35] = 1, "encrypted");
    refused(|image| image[7] = 9, "version 9");
    refused(|image| image[23] = 40, "impossible header");
    refused(|image| image[40..48].copy_from_slice(&u64::MAX.to_be_bytes()), "truncated");
    let text = error(&qcow2_image(|_| {})[..80], None);
    assert!(text.contains("truncated qcow2"), "{text}");
    let text = error(&qcow2_image(|_| {})[..3 << 16], None);
    assert!(text.contains("its tables end at byte 196624"), "{text}");
}

#[test]
fn a_description_is_taken_at_its_word() {
    let image = open_with(
        &disk(),
        Some("user='admin'\npassword_file='secret'\nescalate='sudo'\nfirmware=['uefi']\nkey='console'\nlogin_prompt='user: '"),
    )
    .expect("is right");
    let login = image.login.expect("has a login");
    assert_eq!((login.user.as_str(), login.password.as_deref()), ("admin", Some("from a file")));
    assert_eq!((login.escalate, login.login_prompt.as_deref()), (Escalate::Sudo, Some("user: ")));
    assert_eq!((image.firmware, image.key), (vec![Firmware::Uefi], KeyEntry::Console));
    let image = open_with(&disk(), Some("login=false")).expect("is right");
    assert_eq!((image.login.is_none(), image.key), (true, KeyEntry::None));
}

#[test]
fn a_wrong_description_names_the_file_the_key_and_the_right_one() {
    for (description, words) in [
        ("usr='x'", &["image.toml", "unknown key `usr`", "did you mean `user`?"][..]),
        ("key='ssh'", &["image.toml", "ssh", "smbios"]),
        ("firmware=['efi']", &["efi", "uefi"]),
        ("firmware=[]", &["`firmware` is empty"]),
        ("password='a'\npassword_env='B'", &["exclude each other"]),
        ("password_env='SHAKEDOWN_TEST_UNSET'", &["SHAKEDOWN_TEST_UNSET is not set"]),
        ("password_file='nowhere'", &["nowhere"]),
        ("login=false\nkey='console'", &["needs a login"]),
        ("shell_prompt='('", &["`(`"]),
        ("user=", &["not TOML"]),
    ] {
        let text = error(&disk(), Some(description));
        assert!(words.iter().all(|word| text.contains(word)), "{description}: {text}");
    }
}

#[test]
fn a_missing_file_is_named() {
    let nowhere = Path::new("/nowhere/image.iso");
    let text = format!(
        "{:#}",
        open("x", nowhere, &Table::new(), nowhere, nowhere, &deadline()).expect_err("missing")
    );
    assert!(text.contains("/nowhere/image.iso"), "{text}");
}

#[test]
fn a_seed_cannot_be_broken_out_of_by_a_key_s_comment() {
    let data = user_data("ssh-ed25519 AAAA a: b # \"c\"\nruncmd: [reboot]\n");
    assert!(data.ends_with("  - \"ssh-ed25519 AAAA a: b # \\\"c\\\"\\nruncmd: [reboot]\"\n"), "{data}");
}

#[test]
fn a_seed_is_a_volume_named_cidata_with_both_files() {
    if tools::require("xorriso").is_err() {
        eprintln!("not tested: no xorriso");
        return;
    }
    let dir = tempfile::tempdir().expect("temp dir");
    let out = dir.path().join("seed.iso");
    nocloud_seed("ssh-ed25519 AAAA me", &out, &deadline()).expect("is made");
    let mut iso = Iso::open(&out).expect("is an ISO");
    assert_eq!(iso.volume_id, "cidata");
    for file in ["user-data", "meta-data"] {
        assert!(iso.find(file).expect("reads").is_some_and(|extent| extent.bytes > 0), "{file}");
    }
}
