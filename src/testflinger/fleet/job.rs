//! A shard as a job: what travels to its host, and what runs there.
//!
//! The attachments are the same for all shards: the test binary and what else of the project it needs,
//! and those of the template. Which scenarios to run stands in the job's script. The script wants a POSIX shell with the
//! usual tools, and runs in the job's directory, where agents unpack attachments below `attachments/`
//! and take what is below `artifacts/` back.

use super::harvest::{ENDED, RECORD};
use crate::fault::Fault;
use crate::process::quote;
use crate::record::files;
use crate::testflinger::archive::{Copies, Packer};
use crate::testflinger::template::{Attachment, Template};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

/// The test data that a template cannot give, since they are ours to say.
const OURS: [&str; 2] = ["test_cmds", "attachments"];
/// The test binary among the attachments of the test phase.
const BINARY: &str = "shakedown/scenarios";
const PROJECT: &str = "shakedown/project";

/// What all shards of a run have in common.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Common {
    /// Which queue they go to.
    pub queue: String,
    /// The id of the run: the tag by which all its jobs are found.
    pub tag: String,
    /// What `-m` said.
    pub markers: Option<String>,
    /// Keys of a job that its user wants: `provision_data` above all.
    pub template: Map<String, Value>,
}

impl Common {
    /// Refuses a template that says what a shard has to say itself.
    ///
    /// # Errors
    /// Names the key.
    pub fn check(&self) -> Result<()> {
        let taken = ["job_queue", "job_id", "name", "exclude_agents"];
        if let Some(key) = taken.iter().find(|key| self.template.contains_key(**key)) {
            bail!(
                Fault::host(format!("the template has `{key}`, which each shard says itself"))
                    .fix("remove it")
            );
        }
        let data = match self.template.get("test_data") {
            None => return Ok(()),
            Some(data) => data.as_object().context("`test_data` of the template is no mapping")?,
        };
        if let Some(key) = OURS.iter().find(|key| data.contains_key(**key)) {
            bail!(
                Fault::host(format!("the template has `test_data.{key}`, which is the shard's"))
                    .fix("remove it")
            );
        }
        Ok(())
    }

    /// The job of a shard.
    pub(super) fn job<'a>(
        &self,
        id: &str,
        shard: usize,
        scenarios: impl IntoIterator<Item = &'a str>,
        exclude: impl IntoIterator<Item = &'a String>,
    ) -> Map<String, Value> {
        let mut job = self.template.clone();
        let mut tags = job.get("tags").and_then(Value::as_array).cloned().unwrap_or_default();
        tags.push(self.tag.clone().into());
        let mut test = job.get("test_data").and_then(Value::as_object).cloned().unwrap_or_default();
        test.insert("test_cmds".into(), script(self.markers.as_deref(), scenarios).into());
        test.insert("attachments".into(), json!([{ "agent": BINARY }]));
        let own = [
            ("job_id", json!(id)),
            ("job_queue", json!(self.queue)),
            ("name", json!(format!("shakedown {} shard {shard}", self.tag))),
            ("tags", tags.into()),
            ("test_data", test.into()),
            ("exclude_agents", exclude.into_iter().cloned().collect::<Vec<_>>().into()),
        ];
        job.extend(own.map(|(key, value)| (key.to_owned(), value)));
        job
    }
}

/// What runs on the host. Each finished scenario's ledger line is printed, so that it is known when the
/// host dies; a sign of life every 15 seconds; and at the end the last words of the test binary.
fn script<'a>(markers: Option<&str>, scenarios: impl IntoIterator<Item = &'a str>) -> String {
    let names: String = scenarios.into_iter().map(|name| format!("{name}\n")).collect();
    let markers = markers.map(|markers| format!(" -m {}", quote(markers))).unwrap_or_default();
    format!(
        r#"here=$PWD
given=$here/attachments/test/{PROJECT}
binary=$here/attachments/test/{BINARY}
out=$here/artifacts/shakedown
ledger=$out/notes/vm-run-ledger.jsonl
umask 077
mkdir -p "$out/notes" "$given" || exit 1
: > "$ledger"
cat > "$out/scenarios" <<'END_OF_SCENARIOS'
{names}END_OF_SCENARIOS
unset SHAKEDOWN_DEBUG SHAKEDOWN_MARKERS BOOT_IMAGE_VM_DISABLE_LEDGER NEXTEST NEXTEST_RUN_ID
export SHAKEDOWN_PROJECT="$given" SHAKEDOWN_SCENARIOS="$out/scenarios" SHAKEDOWN_SESSION_BUDGET=4294967295
export BOOT_IMAGE_VM_LOG_ROOT="$out/notes" BOOT_IMAGE_VM_LEDGER_PATH="$ledger"
# When only the shell is killed, the scenarios end with it.
with=
if command -v setpriv > /dev/null && setpriv --pdeathsig TERM true 2> /dev/null; then with='setpriv --pdeathsig TERM'; fi
began=$(date +%s)
(cd "$given" && exec $with "$binary"{markers}) > "$out/output.txt" 2>&1 < /dev/null &
tests=$!
tell() {{
    now=$(wc -l < "$ledger")
    if [ "$now" -gt "$told" ]; then
        sed -n "$((told + 1)),${{now}}p" "$ledger" | sed 's/^/{RECORD}/' || return 1
        told=$now
    elif [ $((beat % 5)) -eq 0 ]; then
        echo "scenarios on record: $told" || return 1
    fi
    beat=$((beat + 1))
}}
told=0 beat=0
trap '' PIPE
trap 'kill -TERM "$tests" 2> /dev/null' TERM INT
while kill -0 "$tests" 2> /dev/null; do
    # Nobody listens any more: the agent is gone.
    tell || kill -TERM "$tests"
    sleep 3 &
    wait "$!"
done
wait "$tests"
status=$?
tell
tail -c 16000 "$out/output.txt"
echo
echo "$status $(($(date +%s) - began))" > "$out/.ended" && mv "$out/.ended" "$out/ended"
echo "{ENDED}$status"
exit "$status"
"#
    )
}

/// What travels with each shard. A server knows no attachments that jobs share, so it is uploaded once
/// a job; it is packed once, and each upload reads that file piece by piece.
#[derive(Clone, Debug)]
pub struct Luggage<'a> {
    /// The test binary.
    pub binary: &'a Path,
    /// The directory of the project.
    pub project: &'a Path,
    /// Files and directories below it. They have the same names on the other host.
    pub with: &'a [PathBuf],
    /// Those of the template: for the phases before the test.
    pub attachments: &'a [Attachment],
}

impl Luggage<'_> {
    /// Packs it.
    ///
    /// # Errors
    /// When something is missing, is not below the project, or cannot be packed.
    pub fn pack(&self, archive: &Path) -> Result<()> {
        let file = File::options().write(true).create_new(true).mode(0o600).open(archive);
        let file = file.with_context(|| files::cannot("make", archive))?;
        let mut packer = Packer::new(file, Copies::Plain);
        packer.add(self.binary, &Path::new("test").join(BINARY))?;
        let root = Path::new("test").join(PROJECT);
        let manifest = Path::new("Cargo.toml");
        let manifest = self.project.join(manifest).exists().then_some(manifest);
        for path in manifest.into_iter().chain(self.with.iter().map(PathBuf::as_path)) {
            let is_below = |part| matches!(part, Component::Normal(_) | Component::CurDir);
            ensure!(
                path.components().all(is_below),
                Fault::host(format!("{} is not below the project", path.display()))
                    .fix("name a path relative to the directory of its Cargo.toml")
            );
            let clean: PathBuf = path.components().filter(|part| *part != Component::CurDir).collect();
            packer.add(&self.project.join(&clean), &root.join(&clean))?;
        }
        for Attachment { local, member } in self.attachments {
            packer.add(local, member)?;
        }
        packer.finish().with_context(|| files::cannot("write", archive))
    }
}

/// Reads what a user's template says of the job, and which files it wants along.
///
/// # Errors
/// What is wrong with it.
pub fn read_template(path: &Path) -> Result<(Map<String, Value>, Vec<Attachment>)> {
    let read = || -> Result<_> {
        let filled = Template::read(path)?.plain()?;
        Ok((filled.job, filled.attachments))
    };
    read().with_context(|| Fault::host(format!("cannot use the template {}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn common(template: Value) -> Common {
        let template = template.as_object().cloned().unwrap_or_default();
        Common { queue: "q".into(), tag: "run-1".into(), markers: Some("any(a, b)".into()), template }
    }

    #[test]
    fn a_job_has_what_its_user_wants_and_what_it_needs() {
        let template = json!({
            "provision_data": {"distro": "noble"}, "tags": ["mine"], "test_data": {"test_username": "u"},
        });
        let common = common(template);
        common.check().expect("is fine");
        let job = common.job("id-1", 7, ["a::b", "c"], &["rack1".to_owned()]);
        assert_eq!(job["provision_data"]["distro"], "noble");
        assert_eq!(job["tags"], json!(["mine", "run-1"]));
        assert_eq!((&job["job_id"], &job["exclude_agents"]), (&json!("id-1"), &json!(["rack1"])));
        assert_eq!(job["test_data"]["test_username"], "u");
        let script = job["test_data"]["test_cmds"].as_str().expect("text");
        assert!(
            script.contains("\na::b\nc\nEND_OF_SCENARIOS\n") && script.contains("-m 'any(a, b)'"),
            "{script}"
        );
    }

    #[test]
    fn a_template_does_not_say_what_is_ours() {
        for template in
            [json!({"job_queue": "x"}), json!({"test_data": {"test_cmds": "true"}}), json!({"test_data": 1})]
        {
            common(template).check().expect_err("refused");
        }
    }

    #[test]
    fn what_travels_is_below_test_and_has_no_links() {
        let dir = tempfile::tempdir().expect("dir");
        let path = |name: &str| dir.path().join(name);
        fs::create_dir_all(path("project/fixtures/sub")).expect("makes");
        for name in ["project/Cargo.toml", "project/fixtures/sub/a", "binary"] {
            fs::write(path(name), name).expect("writes");
        }
        fs::set_permissions(path("binary"), fs::Permissions::from_mode(0o775)).expect("sets");
        std::os::unix::fs::symlink(path("binary"), path("project/fixtures/link")).expect("links");
        let attachments = [Attachment { local: path("binary"), member: "provision/image".into() }];
        let (binary, project, attachments) = (&path("binary"), &path("project"), &attachments);
        let pack = |archive: &str, with: &str| {
            Luggage { binary, project, with: &[with.into()], attachments }.pack(&path(archive))
        };
        pack("a.tar.gz", "./fixtures").expect("packs");
        let mut archive = tar::Archive::new(GzDecoder::new(File::open(path("a.tar.gz")).expect("opens")));
        let entry = |entry: std::io::Result<tar::Entry<'_, _>>| {
            let entry = entry.expect("a member");
            let name = entry.path().expect("a name").display().to_string();
            assert!(!entry.header().entry_type().is_symlink(), "{name}");
            (name, entry.header().mode().expect("a mode"))
        };
        let members: Vec<_> = archive.entries().expect("a tar").map(entry).collect();
        let project = |name: &str, mode| (format!("test/shakedown/project/{name}"), mode);
        assert_eq!(
            members,
            [
                ("test/shakedown/scenarios".to_owned(), 0o755),
                project("Cargo.toml", 0o644),
                project("fixtures", 0o755),
                project("fixtures/link", 0o755),
                project("fixtures/sub", 0o755),
                project("fixtures/sub/a", 0o644),
                ("provision/image".to_owned(), 0o755),
            ]
        );
        for odd in ["../binary", "/etc/passwd", "missing"] {
            pack(&odd.replace('/', "_"), odd).expect_err(odd);
        }
    }
}
