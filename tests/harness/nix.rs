//! The `nix` recipe with the real nix and flakes without inputs, and what it says when nix cannot.
//!
//! Nix has a store of its own in each place, so that any user can run this, and this host's nix is
//! left as it is.

use super::support::{Ended, Place, debian, finish, programs};
use serde_json::Value;
use shakedown::record::metadata::Metadata;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The variables by which nix finds its store, and its settings.
fn nix(place: &Place) -> Vec<(&'static str, PathBuf)> {
    let root = place.path("nix");
    std::fs::create_dir_all(root.join("etc")).expect("makes");
    // Nobody else builds, nothing is fetched, and builders are programs of this host.
    let conf = "build-users-group =\nsubstituters =\nsandbox = false\n";
    std::fs::write(root.join("etc/nix.conf"), conf).expect("writes");
    vec![
        ("NIX_STORE_DIR", root.join("store")),
        ("NIX_STATE_DIR", root.join("var")),
        ("NIX_LOG_DIR", root.join("log")),
        ("NIX_CONF_DIR", root.join("etc")),
        ("XDG_CACHE_HOME", root.join("cache")),
        ("NIX_REMOTE", PathBuf::new()),
        ("NIX_CONFIG", PathBuf::new()),
    ]
}

/// `shakedown image build` in a project.
fn build(place: &Place, project: &Path, image: &str, path: Option<OsString>) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shakedown"));
    command.args(["image", "build", image, "--json"]).current_dir(project).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.envs(place.environment()).envs(nix(place));
    if let Some(path) = path {
        command.env("PATH", path);
    }
    finish(command)
}

/// A project whose image `mine` is the `bootImage` of this flake.
fn project(place: &Place, flake: &str) -> PathBuf {
    let directory = place.path("project");
    std::fs::create_dir_all(&directory).expect("makes");
    let manifest =
        "[package]\nname = 'x'\n[package.metadata.shakedown.images.mine]\nrecipe = 'nix'\nflake = 'path:.'\n";
    std::fs::write(directory.join("Cargo.toml"), manifest).expect("writes");
    std::fs::write(directory.join("flake.nix"), flake).expect("writes");
    directory
}

/// A flake whose image is what this shell script makes of `$out`.
fn made_by(script: &str) -> String {
    format!(
        "{{ outputs = {{ self }}: {{ packages.x86_64-linux.bootImage = derivation {{ name = \"image\"; system = \"x86_64-linux\"; \
         builder = \"/bin/sh\"; args = [ \"-euc\" ''{script}'' ]; PATH = \"/usr/bin:/bin\"; }}; }}; }}"
    )
}

#[test]
fn a_flake_s_image_is_built_booted_and_found_again() {
    let place = Place::new();
    let debian = debian();
    let (digest, fixtures) = (
        debian.digest.trim_start_matches("sha256:"),
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/nix"),
    );
    let input = serde_json::json!({"url": format!("file://{}", debian.file.display()), "outputHash": digest});
    std::fs::write(fixtures.join("image.json"), input.to_string()).expect("writes");

    let mut command = place.command("machines", &["--exact", "a_flake_made_it"]);
    command.envs(nix(&place));
    let run = finish(command);
    assert_eq!(run.code, Some(0), "{run:?}");
    let record = place.records().pop().expect("a record");
    let metadata = std::fs::read(record.metadata.expect("a path")).expect("reads");
    let metadata: Metadata = serde_json::from_slice(&metadata).expect("sound");
    let (image, artifact) = (metadata.image.expect("an image"), metadata.artifact.expect("an artifact"));
    assert_eq!(image.recipe.as_deref(), Some("nix"));
    assert_ne!(image.digest.as_deref(), Some(debian.digest.as_str()), "it is another ISO");
    let store = place.path("nix/store");
    assert!(artifact.store_path.is_some_and(|path| path.starts_with(&store)), "its place in nix's store");
    assert!(artifact.deriver.is_some_and(|path| path.ends_with("-boot-image.drv")));
    assert!(artifact.nar_hash.is_some_and(|hash| hash.starts_with("sha256-")));
    // The build is told as it goes, and all of it is kept.
    let log = std::fs::read_to_string(record.harness_log.expect("a log")).expect("reads");
    assert!(log.contains("building image: building boot-image"), "{log}");
    assert!(artifact.iso_path.starts_with(place.path("cache")), "what nix may collect is not relied on");
    let output = std::fs::read_to_string(artifact.iso_path.with_file_name("build.log")).expect("reads");
    assert!(output.contains("boot-image> ISO image produced"), "{output}");

    let again = build(&place, Path::new(env!("CARGO_MANIFEST_DIR")), "flake", None);
    let built: Value = serde_json::from_str(&again.out).expect("JSON");
    assert_eq!(built["file"].as_str().map(Path::new), Some(artifact.iso_path.as_path()));
    assert!(again.err.contains("image flake ready, from the store"), "{again:?}");
}

#[test]
fn what_a_flake_does_wrong_is_named() {
    let place = Place::new();
    for (flake, words) in [
        ("{ outputs = { self }: { }; }", &["the flake has no such image", "fix: correct `attribute`"][..]),
        ("{ outputs = { self }: { packages.x86_64-linux.bootImage = 1; }; }", &["nix cannot evaluate"]),
        ("{ outputs", &["nix cannot evaluate", "syntax error"]),
        (&made_by("echo no disk here; exit 3"), &["nix cannot build", "image> no disk here", "exit code 3"]),
        (&made_by("mkdir $out"), &["is empty: there is no ISO"]),
        (&made_by("mkdir $out; echo > $out/a.iso.zst"), &["a.iso.zst", "compressImage = false"]),
        (&made_by("mkdir $out; echo 1 > $out/a.iso; echo 2 > $out/b.iso"), &["2 ISOs", "/a.iso", "/b.iso"]),
        (&made_by("echo text > $out"), &["there is no ISO in"]),
        (
            &made_by("mkdir $out; echo text > $out/a.iso"),
            &["image.iso cannot be used as an image", "but text"],
        ),
    ] {
        let run = build(&place, &project(&place, flake), "mine", None);
        assert!(run.code == Some(2) || run.code == Some(1), "{flake}: {run:?}");
        assert!(words.iter().all(|word| run.err.contains(word)), "{flake}: {words:?} in\n{}", run.err);
        assert_eq!(run.out, "", "{flake}");
    }
    std::fs::remove_file(place.path("project/flake.nix")).expect("removes");
    let run = build(&place, &place.path("project"), "mine", None);
    assert!(run.err.contains("there is no ") && run.err.contains("fix: set `flake`"), "{run:?}");
}

#[test]
fn without_network_it_says_what_to_do() {
    let place = Place::new();
    // No name below `.invalid` ever resolves: RFC 2606.
    let flake = "{ inputs.nixpkgs.url = \"https://nixpkgs.invalid/nixpkgs.tar.gz\"; outputs = { self, nixpkgs }: { packages = nixpkgs; }; }";
    let run = build(&place, &project(&place, flake), "mine", None);
    for words in
        ["nix cannot evaluate", "nix cannot reach what it has to fetch", "fix: connect to the network"]
    {
        assert!(run.err.contains(words), "{run:?}");
    }
}

/// As far as it goes without nixpkgs: all of it is Nix, its names are in scope, its files are there.
#[test]
fn the_nixos_flake_evaluates_with_a_stand_in_for_nixpkgs() {
    let place = Place::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let flake = format!("path:{}", root.join("nix").display());
    let stand_in = format!("path:{}", root.join("fixtures/nixpkgs").display());
    let run = |arguments: &[&str]| {
        let mut command = Command::new("nix");
        command.args(["--extra-experimental-features", "nix-command flakes"]).args(arguments);
        command.args(["--no-write-lock-file", "--override-input", "nixpkgs", &stand_in]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).envs(nix(&place));
        let ended = finish(command);
        assert_eq!(ended.code, Some(0), "{ended:?}");
        ended.out
    };
    run(&["flake", "check", &flake, "--no-build"]);
    run(&["eval", "--raw", &format!("{flake}#devShells.x86_64-linux.default.drvPath")]);
    let settings = run(&["eval", "--raw", &format!("{flake}#bootImage.settings")]);
    let settings: Value = serde_json::from_str(&settings).expect("JSON");
    let [machine] = &settings.as_array().expect("a list")[..] else { panic!("one module: {settings}") };
    assert_eq!(machine["boot"]["kernelParams"][1], "console=ttyS0,115200");
    let key = &machine["systemd"]["tmpfiles"]["settings"]["50-shakedown"]["/root/.ssh/authorized_keys"]["f^"];
    assert_eq!(key["argument"], "ssh.authorized_keys.root");
    for enabled in
        [&machine["services"]["openssh"], &machine["services"]["qemuGuest"], &machine["boot"]["swraid"]]
    {
        assert_eq!(enabled["enable"], true, "{machine}");
    }
    assert!(machine["environment"].to_string().contains("-storage-cleanup\""), "{machine}");
}

/// What other versions of nix say, by a program in its place.
#[test]
fn other_versions_of_nix_are_coped_with() {
    let place = Place::new();
    let project = project(&place, "{ }");
    let stub = |version: &str, eval: &str, info: &str| {
        let result = place.path("result");
        std::fs::create_dir_all(&result).expect("makes");
        let _ = std::os::unix::fs::symlink(debian().file, result.join("debian.iso"));
        let answer = format!(
            "[{{\"drvPath\":\"/nix/store/x-{info}.drv\",\"outputs\":{{\"out\":\"{}\"}}}}]",
            result.display()
        );
        let script = format!(
            "case \"$*\" in\n--version) echo 'nix (Nix) {version}' ;;\n*' eval '*) {eval} ;;\n*' build '*) echo '{answer}' ;;\n\
             *' path-info '*) echo '{info}' ;;\nesac"
        );
        programs(&place.path("bin"), &[("nix", &script)])
    };
    let old = build(&place, &project, "mine", Some(stub("2.3.16", "exit 1", "")));
    assert!(old.err.contains("2.3.16 is too old, 2.4 or newer is needed"), "{old:?}");
    let disabled = "echo \"error: experimental Nix feature 'flakes' is disabled\" >&2; exit 1";
    let disabled = build(&place, &project, "mine", Some(stub("2.18.1", disabled, "")));
    assert!(disabled.err.contains("flakes are not enabled here"), "{disabled:?}");
    assert!(disabled.err.contains("fix: put `experimental-features = nix-command flakes`"), "{disabled:?}");

    let empty = build(&place, &project, "mine", Some(stub("2.18.1", "echo /nix/store/x-[].drv", "[]")));
    assert_eq!(empty.code, Some(0), "{empty:?}");
    assert!(empty.err.contains("nix knows neither deriver nor NAR hash"), "{empty:?}");
    let moved = build(&place, &project, "mine", Some(stub("2.18.1", "echo /nix/store/other.drv", "[]")));
    assert!(
        moved.err.contains("changed while it was built") && moved.err.contains("fix: start again"),
        "{moved:?}"
    );
}
