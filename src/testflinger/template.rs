//! The template of a job: what is submitted, and which files go with it.

use crate::fault::Fault;
use crate::record::files;
use crate::testflinger::wire::Phase;
use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value};
use std::path::{Component, Path, PathBuf};

/// What stands for the machine in a template of jobs for several.
pub const PLACEHOLDER: &str = "$CANONICAL_ID";

/// A job description, perhaps with placeholders.
#[derive(Clone, Debug)]
pub struct Template {
    text: String,
    /// What relative paths of attachments are relative to.
    place: PathBuf,
}

/// What is submitted.
#[derive(Clone, Debug, PartialEq)]
pub struct Filled {
    /// As the server takes it.
    pub job: Map<String, Value>,
    /// The files that go with it.
    pub attachments: Vec<Attachment>,
    /// The server hands the job out only after an upload, be it an empty one.
    pub wants_upload: bool,
}

/// A file or directory for the agent.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attachment {
    /// Where it is here.
    pub local: PathBuf,
    /// Where it goes in the archive: below the name of a phase.
    pub member: PathBuf,
}

impl Template {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// A host [`Fault`] when it cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || -> Result<Self> {
            let text = std::fs::read_to_string(path)?;
            let place = std::fs::canonicalize(path)?;
            Ok(Self { text, place: place.parent().unwrap_or(Path::new("/")).to_owned() })
        };
        read().with_context(|| files::cannot("read the template", path))
    }

    /// True when jobs of different machines differ.
    pub fn has_placeholder(&self) -> bool {
        self.text.contains(PLACEHOLDER)
    }

    /// The job of `machine`.
    ///
    /// # Errors
    /// As of [`Self::plain`]; a job without a queue.
    pub fn fill(&self, machine: &str) -> Result<Filled> {
        let filled = self.parse(&self.text.replace(PLACEHOLDER, machine))?;
        match filled.job.get("job_queue") {
            Some(Value::String(queue)) if !queue.is_empty() => Ok(filled),
            None => bail!("`job_queue` is missing"),
            Some(other) => {
                bail!("`job_queue` is {other}, which is no text: put it in quotes, as \"{PLACEHOLDER}\"")
            }
        }
    }

    /// The job as it stands there. Its queue may be said elsewhere.
    ///
    /// # Errors
    /// What is wrong with the template: no YAML, attachments without a place.
    pub fn plain(&self) -> Result<Filled> {
        self.parse(&self.text)
    }

    fn parse(&self, text: &str) -> Result<Filled> {
        let job: Value = serde_saphyr::from_str(text).context("it is no YAML")?;
        let Value::Object(mut job) = job else { bail!("it is no mapping of a job's fields") };
        ensure!(!job.contains_key("job_id"), "`job_id` is ours to choose: remove it");
        let tags = job.entry("tags").or_insert_with(|| Value::Array(Vec::new()));
        let is_list = tags.as_array().is_some_and(|tags| tags.iter().all(Value::is_string));
        ensure!(is_list, "`tags` is {tags}, and no list of texts");
        let mut attachments = Vec::new();
        for phase in Phase::WITH_ATTACHMENTS {
            let name = format!("{phase}_data");
            let Some(announced) = job.get_mut(&name).and_then(|data| data.get_mut("attachments")) else {
                continue;
            };
            let Value::Array(announced) = announced else { bail!("`{name}.attachments` is no list") };
            for (index, attachment) in announced.iter_mut().enumerate() {
                let taken = self.take(phase, attachment);
                attachments.extend(taken.with_context(|| format!("`{name}.attachments[{index}]`"))?);
            }
        }
        let wants_upload =
            job.iter().any(|(name, data)| name.ends_with("_data") && data.get("attachments").is_some());
        Ok(Filled { job, attachments, wants_upload })
    }

    /// Takes `local` out of an attachment and fills in `agent`, as the server wants it. Without `local`
    /// there is nothing to pack.
    fn take(&self, phase: Phase, attachment: &mut Value) -> Result<Option<Attachment>> {
        let Value::Object(fields) = attachment else { bail!("it is no mapping with `local` and `agent`") };
        let local = match fields.shift_remove("local") {
            None => return Ok(None),
            Some(Value::String(local)) if !local.is_empty() => self.place.join(local),
            Some(other) => bail!("`local` is {other}, and no path"),
        };
        let local = std::fs::canonicalize(&local).with_context(|| {
            Fault::host(format!("there is no {}", local.display()))
                .fix("paths of attachments are relative to the directory of the template")
        })?;
        let agent = match fields.get("agent") {
            Some(Value::String(agent)) => PathBuf::from(agent.trim_start_matches('/')),
            Some(other) => bail!("`agent` is {other}, and no path"),
            None => match local.strip_prefix(&self.place) {
                Ok(relative) => relative.to_owned(),
                Err(_) => local.file_name().unwrap_or_default().into(),
            },
        };
        // What leaves the directory of the phase, or is that, is refused where it is unpacked.
        let clean: PathBuf = agent.components().filter(|part| *part != Component::CurDir).collect();
        let inside = clean.components().all(|part| matches!(part, Component::Normal(_)));
        ensure!(
            inside && !clean.as_os_str().is_empty(),
            "`agent` is {:?}: it must name a place below the attachments of the phase",
            agent.display().to_string()
        );
        let name = clean.to_str().context("the path is not UTF-8")?;
        fields.insert("agent".into(), name.into());
        Ok(Some(Attachment { local, member: Path::new(phase.name()).join(clean) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(text: &str) -> (tempfile::TempDir, Template) {
        let dir = tempfile::tempdir().expect("temp dir");
        std::fs::create_dir(dir.path().join("bin")).expect("makes");
        for name in ["hwctl", "bin/m1.conf"] {
            std::fs::write(dir.path().join(name), name).expect("writes");
        }
        let path = dir.path().join("tf-job.yaml");
        std::fs::write(&path, text).expect("writes");
        let template = Template::read(&path).expect("reads");
        (dir, template)
    }

    fn fault(text: &str) -> String {
        format!("{:#}", template(text).1.fill("m1").expect_err("wrong"))
    }

    #[test]
    fn the_machine_is_filled_in_everywhere_and_attachments_are_as_the_server_wants_them() {
        let (dir, template) = template(
            "job_queue: $CANONICAL_ID\nprovision_data:\n  distro: jammy\ntest_data:\n  attachments:\n\
             \x20   - local: hwctl\n    - {local: ./bin/$CANONICAL_ID.conf, agent: /etc/x.conf, device: d}\n\
             \x20   - local: bin\n    - agent: there\n\
             \x20 test_cmds: |\n    run $CANONICAL_ID\n",
        );
        let filled = template.fill("m1").expect("fills");
        assert_eq!(
            Value::Object(filled.job),
            json!({
                "job_queue": "m1", "provision_data": {"distro": "jammy"}, "tags": [],
                "test_data": {
                    "attachments": [{"agent": "hwctl"}, {"agent": "etc/x.conf", "device": "d"}, {"agent": "bin"}, {"agent": "there"}],
                    "test_cmds": "run m1\n",
                },
            })
        );
        let place = dir.path().canonicalize().expect("exists");
        let packed =
            |local: &str, member: &str| Attachment { local: place.join(local), member: member.into() };
        let expected = [("hwctl", "test/hwctl"), ("bin/m1.conf", "test/etc/x.conf"), ("bin", "test/bin")];
        assert_eq!(filled.attachments, expected.map(|(local, member)| packed(local, member)));
        assert!(filled.wants_upload);
    }

    #[test]
    fn a_file_from_elsewhere_keeps_its_name_alone() {
        let other = tempfile::NamedTempFile::new().expect("a file");
        let path = other.path().display();
        let (_dir, template) =
            template(&format!("job_queue: q\nprovision_data: {{attachments: [{{local: {path}}}]}}\n"));
        let filled = template.fill("m1").expect("fills");
        let name = other.path().file_name().expect("a name");
        assert_eq!(filled.attachments[0].member, Path::new("provision").join(name));
    }

    #[test]
    fn what_is_announced_is_uploaded_even_when_there_is_nothing() {
        let wants = |text| template(text).1.fill("m1").expect("fills").wants_upload;
        assert!(wants("job_queue: q\ntest_data: {attachments: []}\n"));
        assert!(wants("job_queue: q\nallocate_data: {attachments: [x]}\n"));
        assert!(!wants("job_queue: q\nprovision_data: null\n"));
    }

    #[test]
    fn faults_say_where_they_are() {
        for (text, part) in [
            ("job_queue: [", "YAML"),
            ("- a\n", "no mapping"),
            ("test_data: {}\n", "`job_queue` is missing"),
            ("job_queue: 202101\n", "in quotes"),
            ("job_queue: q\njob_id: x\n", "`job_id`"),
            ("job_queue: q\ntags: x\n", "`tags`"),
            ("job_queue: q\ntest_data: {attachments: {}}\n", "no list"),
            ("job_queue: q\ntest_data: {attachments: [{local: none}]}\n", "there is no"),
            ("job_queue: q\ntest_data: {attachments: [{local: hwctl, agent: ../x}]}\n", "attachments[0]"),
            ("job_queue: q\ntest_data: {attachments: [{local: .}]}\n", "below the attachments"),
        ] {
            let fault = fault(text);
            assert!(fault.contains(part), "{text:?}: {fault}");
        }
    }
}
