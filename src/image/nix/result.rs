//! What nix says about a result, in all the shapes its versions have for it, and the ISO in it.

use crate::fault::Fault;
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// No image hides its ISO deeper than that.
const DEPTH: usize = 8;

/// One thing that was built.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Built {
    pub(super) derivation: String,
    pub(super) path: PathBuf,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "drvPath")]
    derivation: String,
    outputs: BTreeMap<String, String>,
}

/// Reads the answer of `nix build --json`.
///
/// # Errors
/// A host [`Fault`] with the answer when it is not of one thing with one result.
pub(super) fn built(text: &str) -> Result<Built> {
    let odd = || Fault::host(format!("nix build gave an answer that is not understood: {}", text.trim()));
    let answers: Vec<Answer> = serde_json::from_str(text).with_context(odd)?;
    let [Answer { derivation, outputs }] = &answers[..] else { bail!(odd()) };
    let path = match (outputs.get("out"), outputs.len()) {
        (Some(out), _) => out,
        (None, 1) => outputs.values().next().with_context(odd)?,
        _ => bail!(odd()),
    };
    if !path.starts_with('/') {
        bail!(odd());
    }
    Ok(Built { derivation: derivation.clone(), path: path.into() })
}

/// Reads deriver and NAR hash from the answer of `nix path-info --json`: a list until 2.18, an object
/// by path since 2.19; nothing at all in odd cases.
pub(super) fn path_info(text: &str, path: &Path) -> (Option<String>, Option<String>) {
    let answer: Value = serde_json::from_str(text).unwrap_or_default();
    let entry = match &answer {
        Value::Array(list) => list.first(),
        Value::Object(map) => path.to_str().and_then(|path| map.get(path)),
        _ => None,
    };
    let field = |name: &str| entry.and_then(|entry| entry[name].as_str()).map(str::to_owned);
    (field("deriver"), field("narHash"))
}

/// The one ISO that a result is, or has.
///
/// # Errors
/// A host [`Fault`] that names what is there when it is none, or several.
pub(super) fn find_iso(result: &Path) -> Result<PathBuf> {
    let cannot = || Fault::host(format!("cannot look into {}", result.display()));
    let meta = result.metadata().with_context(cannot)?;
    let mut files = Vec::new();
    if meta.is_file() {
        files.push(result.to_owned());
    } else {
        collect(result, DEPTH, &mut files).with_context(cannot)?;
    }
    let (isos, others): (Vec<_>, Vec<_>) =
        files.into_iter().partition(|file| file.extension().is_some_and(|ext| ext == "iso"));
    let list = |files: &[PathBuf]| {
        let shown: Vec<_> = files.iter().take(5).map(|file| format!("\n  {}", file.display())).collect();
        let more = if files.len() > 5 { "\n  ..." } else { "" };
        shown.concat() + more
    };
    match &isos[..] {
        [iso] => Ok(iso.clone()),
        [] if others.is_empty() => {
            bail!(Fault::host(format!("{} is empty: there is no ISO in it", result.display())))
        }
        [] => {
            let packed = others.iter().any(|file| file.to_string_lossy().contains(".iso."));
            let fix = if packed {
                "have it built unpacked: `isoImage.compressImage = false`"
            } else {
                "set `attribute` of the image to what builds an ISO"
            };
            bail!(
                Fault::host(format!("there is no ISO in {}, but{}", result.display(), list(&others)))
                    .fix(fix)
            )
        }
        _ => bail!(
            Fault::host(format!("there are {} ISOs in {}:{}", isos.len(), result.display(), list(&isos)))
                .fix("set `attribute` of the image to what builds one ISO")
        ),
    }
}

/// All files, each once: of a result that is a set of links into others too.
fn collect(directory: &Path, depth: usize, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries = fs::read_dir(directory)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::path);
    for entry in entries {
        let path = entry.path();
        // A link that leads nowhere is no image.
        let Ok(meta) = path.metadata() else { continue };
        if meta.is_file() {
            let real = path.canonicalize()?;
            if !files.contains(&real) {
                files.push(real);
            }
        } else if meta.is_dir() && depth > 0 {
            collect(&path, depth - 1, files)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PATH: &str = "/nix/store/w4s5sk7awisg4ki91i83g7gxysnvfii3-boot-image";

    #[test]
    fn an_answer_names_what_was_built() {
        let built_by = |text: &str| built(text).map(|built| built.path.display().to_string());
        // nix 2.8
        let real = r#"[{"drvPath":"/nix/store/i1yni2zkhdcdk5lvlff5877p4l4smpid-boot-image.drv","outputs":{"out":"/nix/store/w4s5sk7awisg4ki91i83g7gxysnvfii3-boot-image"}}]"#;
        assert_eq!(built_by(real).expect("reads"), PATH);
        let newer = r#"[{"drvPath":"/a.drv","outputs":{"iso":"/b"},"startTime":1,"stopTime":2}]"#;
        assert_eq!(built_by(newer).expect("reads"), "/b");
        let many = r#"[{"drvPath":"/a.drv","outputs":{"dev":"/d","out":"/b"}}]"#;
        assert_eq!(built_by(many).expect("reads"), "/b");
        for odd in [
            "",
            "[]",
            "{}",
            "/nix/store/x",
            r#"[{"drvPath":"/a.drv","outputs":{}}]"#,
            r#"[{"drvPath":"/a.drv","outputs":{"a":"/a","b":"/b"}}]"#,
            r#"[{"drvPath":"/a.drv","outputs":{"out":"relative"}}]"#,
        ] {
            let text = format!("{:#}", built(odd).expect_err(odd));
            assert!(text.contains("not understood") && text.contains(odd), "{text}");
        }
    }

    #[test]
    fn deriver_and_hash_are_read_from_every_shape() {
        let entry = r#"{"path":"/nix/store/w4s5sk7awisg4ki91i83g7gxysnvfii3-boot-image","narHash":"sha256-EFUdrtf6Rn0LWIJufrmg8q99aT3jGfLvd1//zaJEufY=","deriver":"/nix/store/d.drv","ultimate":true}"#;
        let found = (
            Some("/nix/store/d.drv".to_owned()),
            Some("sha256-EFUdrtf6Rn0LWIJufrmg8q99aT3jGfLvd1//zaJEufY=".to_owned()),
        );
        assert_eq!(path_info(&format!("[{entry}]"), Path::new(PATH)), found);
        assert_eq!(path_info(&format!("{{\"{PATH}\":{entry}}}"), Path::new(PATH)), found);
        let nothing = format!("{{\"{PATH}\":null}}");
        for empty in ["", "[]", "{}", "null", "not JSON", "[{}]", &nothing, r#"{"/other":{"deriver":"/d"}}"#]
        {
            assert_eq!(path_info(empty, Path::new(PATH)), (None, None), "{empty}");
        }
        assert_eq!(
            path_info(r#"[{"deriver":null,"narHash":"sha256-x"}]"#, Path::new(PATH)).1.as_deref(),
            Some("sha256-x")
        );
    }

    fn with(files: &[&str]) -> tempfile::TempDir {
        let result = tempfile::tempdir().expect("temp dir");
        for file in files {
            let path = result.path().join(file);
            fs::create_dir_all(path.parent().expect("a directory")).expect("makes");
            fs::write(path, "").expect("writes");
        }
        result
    }

    #[test]
    fn one_iso_is_found_wherever_it_is() {
        let result = with(&["iso/nixos.iso", "nix-support/hydra-build-products"]);
        let iso = result.path().canonicalize().expect("is there").join("iso/nixos.iso");
        assert_eq!(find_iso(result.path()).expect("one"), iso);
        assert_eq!(find_iso(&iso).expect("itself"), iso);
        std::os::unix::fs::symlink(&iso, result.path().join("again.iso")).expect("links");
        std::os::unix::fs::symlink("/nowhere", result.path().join("dead.iso")).expect("links");
        std::os::unix::fs::symlink(result.path(), result.path().join("circle")).expect("links");
        assert_eq!(find_iso(result.path()).expect("still one"), iso);
    }

    #[test]
    fn none_and_several_isos_are_refused_by_name() {
        for (files, words) in [
            (&[][..], &["is empty"][..]),
            (&["bin/x"], &["no ISO in", "/bin/x", "Fix: set `attribute`"]),
            (&["iso/nixos.iso.zst"], &["nixos.iso.zst", "compressImage = false"]),
            (&["a.iso", "b/c.iso"], &["2 ISOs", "/a.iso", "/b/c.iso", "Fix: set `attribute`"]),
            (&["1", "2", "3", "4", "5", "6"], &["/5\n  ..."]),
        ] {
            let text = find_iso(with(files).path()).expect_err("refused").to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{files:?}: {text}");
        }
        assert!(find_iso(Path::new("/nowhere")).is_err());
    }

    proptest! {
        #[test]
        fn any_answer_is_survived(text in "\\PC*") {
            let _ = built(&text);
            path_info(&text, Path::new(PATH));
        }
    }
}
