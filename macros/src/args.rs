//! What stands between the parentheses of `#[scenario(...)]`.

use crate::value;
use proc_macro2::{Ident, Span, TokenStream};
use syn::parse::{Parse, ParseStream, Parser};
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::{Error, Expr, ExprLit, Lit, LitStr, Result, Token, parse_quote};

/// Keys that hold for every scenario.
const GENERAL: [&str; 4] = ["markers", "ignore", "timeout", "name"];
/// Keys that describe a machine.
const MACHINE: [&str; 9] =
    ["image", "boot", "medium", "firmware", "disks", "memory", "cpus", "hostname", FRESH_MACHINE_ID];
/// The only key without a value.
const FRESH_MACHINE_ID: &str = "fresh_machine_id";
const REBOOTS: &str = "reboots";

/// The arguments, checked. `None` is "not given".
#[derive(Default)]
pub(crate) struct Args {
    pub(crate) markers: Vec<Ident>,
    pub(crate) ignore: Option<LitStr>,
    pub(crate) timeout_ms: Option<u64>,
    pub(crate) name: Option<LitStr>,
    pub(crate) machine: Machine,
    /// The first key that needs a machine, for the message where there is none.
    pub(crate) machine_key: Option<Ident>,
}

/// Words are the variants of the `shakedown` enums.
#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) image: Option<LitStr>,
    pub(crate) boot: Option<Ident>,
    pub(crate) medium: Option<Ident>,
    pub(crate) firmware: Option<Ident>,
    pub(crate) disks: Vec<Disk>,
    pub(crate) memory_mib: Option<u32>,
    pub(crate) cpus: Option<u32>,
    pub(crate) hostname: Option<LitStr>,
    pub(crate) fresh_machine_id: bool,
    pub(crate) reboots: bool,
}

pub(crate) struct Disk {
    pub(crate) bytes: u64,
    /// A variant of `Bus`.
    pub(crate) bus: Ident,
}

struct Setting {
    key: Ident,
    value: Expr,
}

impl Parse for Setting {
    fn parse(input: ParseStream<'_>) -> Result<Self> {
        let key: Ident = input.parse()?;
        if key == FRESH_MACHINE_ID {
            // Whoever reads it wants an expression as of any other key.
            return match input.peek(Token![=]) {
                true => Err(Error::new(key.span(), format!("`{key}` has no value: it stands alone"))),
                false => Ok(Self { value: parse_quote!(true), key }),
            };
        }
        if !input.peek(Token![=]) {
            return Err(Error::new(key.span(), format!("`{key}` needs a value: `{key} = ...`")));
        }
        input.parse::<Token![=]>()?;
        Ok(Self { key, value: input.parse()? })
    }
}

impl Args {
    /// Reads the arguments; the error has all mistakes, each at its place.
    pub(crate) fn parse(tokens: TokenStream) -> Result<Self> {
        let settings = Punctuated::<Setting, Token![,]>::parse_terminated.parse2(tokens)?;
        let mut args = Self::default();
        let mut seen: Vec<String> = Vec::new();
        let mut errors: Option<Error> = None;
        for setting in settings {
            let key = setting.key.to_string();
            let result = if seen.contains(&key) {
                Err(Error::new(setting.key.span(), format!("`{key}` is given twice")))
            } else {
                args.set(setting)
            };
            seen.push(key);
            if let Err(error) = result {
                match &mut errors {
                    Some(all) => all.combine(error),
                    None => errors = Some(error),
                }
            }
        }
        errors.map_or(Ok(args), Err)
    }

    fn set(&mut self, Setting { key, value }: Setting) -> Result<()> {
        let name = key.to_string();
        if MACHINE.contains(&name.as_str()) && self.machine_key.is_none() {
            self.machine_key = Some(key.clone());
        }
        let machine = &mut self.machine;
        match name.as_str() {
            "markers" => self.markers = markers(&value)?,
            "ignore" => self.ignore = Some(text(&value, "a reason in quotes")?),
            "timeout" => self.timeout_ms = Some(literal(&value, "a duration in quotes", value::duration)?),
            "name" => self.name = Some(text(&value, "a name in quotes")?),
            "image" => machine.image = Some(text(&value, "an image's name in quotes")?),
            "boot" => machine.boot = Some(word(&value, "boot kind", &["fork", "cold"])?),
            "medium" => machine.medium = Some(word(&value, "medium", &["kernel", "cdrom", "disk"])?),
            "firmware" => machine.firmware = Some(word(&value, "firmware", &["bios", "uefi"])?),
            "disks" => machine.disks = list(&value, "disks")?.map(disk).collect::<Result<_>>()?,
            "memory" => machine.memory_mib = Some(literal(&value, "a size in quotes", mebibytes)?),
            "cpus" => machine.cpus = Some(cpus(&value)?),
            "hostname" => {
                literal(&value, "a name in quotes", value::hostname)?;
                machine.hostname = Some(string(&value, "a name in quotes")?);
            }
            FRESH_MACHINE_ID => machine.fresh_machine_id = true,
            REBOOTS => machine.reboots = true,
            _ => {
                let known = [&GENERAL[..], &MACHINE[..]].concat();
                return Err(Error::new(key.span(), value::unknown("key", key, &known)));
            }
        }
        Ok(())
    }
}

fn string(value: &Expr, wanted: &str) -> Result<LitStr> {
    match value {
        Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => Ok(text.clone()),
        other => Err(Error::new(other.span(), format!("expected {wanted}"))),
    }
}

fn text(value: &Expr, wanted: &str) -> Result<LitStr> {
    let text = string(value, wanted)?;
    if text.value().trim().is_empty() {
        return Err(Error::new(text.span(), format!("expected {wanted}, this is empty")));
    }
    Ok(text)
}

/// A string literal read by `parse`, whose message then points at the literal.
fn literal<T>(
    value: &Expr,
    wanted: &str,
    parse: impl Fn(&str) -> std::result::Result<T, String>,
) -> Result<T> {
    let text = string(value, wanted)?;
    parse(&text.value()).map_err(|message| Error::new(text.span(), message))
}

fn mebibytes(text: &str) -> std::result::Result<u32, String> {
    let bytes = value::size(text)?;
    u32::try_from(bytes >> 20)
        .ok()
        .filter(|_| bytes % (1 << 20) == 0)
        .ok_or_else(|| format!("`{text}` is not a whole number of MiB that a machine can have"))
}

fn cpus(value: &Expr) -> Result<u32> {
    let number = match value {
        Expr::Lit(ExprLit { lit: Lit::Int(number), .. }) => number.base10_parse().unwrap_or(0),
        _ => 0,
    };
    // 255 is the limit of QEMU's q35 without extended interrupt modes.
    if (1..=255).contains(&number) {
        Ok(number)
    } else {
        Err(Error::new(value.span(), "expected a number of CPUs from 1 to 255"))
    }
}

fn list<'a>(value: &'a Expr, key: &str) -> Result<impl Iterator<Item = &'a Expr> + use<'a>> {
    match value {
        Expr::Array(array) => Ok(array.elems.iter()),
        other => Err(Error::new(other.span(), format!("expected a list: `{key} = [...]`"))),
    }
}

fn markers(value: &Expr) -> Result<Vec<Ident>> {
    let mut markers: Vec<Ident> = Vec::new();
    for item in list(value, "markers")? {
        let marker =
            ident(item).ok_or_else(|| Error::new(item.span(), "expected a marker without quotes"))?;
        if markers.contains(&marker) {
            return Err(Error::new(marker.span(), format!("marker `{marker}` is given twice")));
        }
        markers.push(marker);
    }
    Ok(markers)
}

fn ident(value: &Expr) -> Option<Ident> {
    match value {
        Expr::Path(path) => path.path.get_ident().cloned(),
        _ => None,
    }
}

/// One of `known`, in lower case or as a variant, which is what it becomes.
fn word(value: &Expr, what: &str, known: &[&str]) -> Result<Ident> {
    let given = ident(value)
        .ok_or_else(|| Error::new(value.span(), format!("expected `{}`", known.join("` or `"))))?;
    variant(&given, what, known)
}

fn variant(given: &Ident, what: &str, known: &[&str]) -> Result<Ident> {
    let text = given.to_string();
    let found = known.iter().map(|word| (word, capitalised(word))).find(|(k, c)| **k == text || *c == text);
    match found {
        Some((_, variant)) => Ok(Ident::new(&variant, given.span())),
        None => Err(Error::new(given.span(), value::unknown(what, given, known))),
    }
}

fn capitalised(word: &str) -> String {
    let (first, rest) = word.split_at(1);
    first.to_uppercase() + rest
}

/// `"4G"`, or `nvme("4G")`.
fn disk(value: &Expr) -> Result<Disk> {
    const WANTED: &str = "a size in quotes, or a bus around it as in `nvme(\"4G\")`";
    match value {
        Expr::Call(call) if call.args.len() == 1 => {
            let bus = word(&call.func, "bus", &["virtio", "nvme", "ahci"])?;
            Ok(Disk { bytes: literal(&call.args[0], "a size in quotes", value::size)?, bus })
        }
        other => Ok(Disk {
            bytes: literal(other, WANTED, value::size)?,
            bus: Ident::new("Virtio", Span::call_site()),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Args> {
        Args::parse(text.parse().expect("tokens"))
    }

    fn mistakes(text: &str) -> Vec<String> {
        let error = parse(text).err().expect(text);
        error.into_iter().map(|error| error.to_string()).collect()
    }

    #[test]
    fn everything_at_once() {
        let args = parse(
            r#"markers = [vm, slow], disks = ["4G", nvme("1536M"),], firmware = Uefi, boot = cold,
               medium = cdrom, image = "debian", memory = "2G", cpus = 4, timeout = "3m",
               ignore = "no lab", name = "blank disks", fresh_machine_id, hostname = "node-1""#,
        )
        .expect("parses");
        assert_eq!(args.markers, ["vm", "slow"]);
        assert_eq!(args.timeout_ms, Some(180_000));
        let disks: Vec<_> = args.machine.disks.iter().map(|d| (d.bytes, d.bus.to_string())).collect();
        assert_eq!(disks, [(4 << 30, "Virtio".into()), (1536 << 20, "Nvme".into())]);
        assert_eq!(args.machine.firmware.expect("given"), "Uefi");
        assert_eq!(args.machine.boot.expect("given"), "Cold");
        assert_eq!(args.machine.memory_mib, Some(2048));
        assert_eq!(args.machine.cpus, Some(4));
        assert_eq!(args.machine.hostname.expect("given").value(), "node-1");
        assert!(args.machine.fresh_machine_id);
        assert_eq!(args.machine_key.expect("given"), "disks");
    }

    #[test]
    fn mistakes_say_what_is_right() {
        for (text, message) in [
            ("timout = \"3m\"", "did you mean `timeout`?"),
            ("timeout = \"3x\"", "`3x` is not a duration"),
            ("timeout = 180", "a duration in quotes"),
            ("firmware = uefy", "did you mean `uefi`?"),
            ("boot = Warm", "known are `fork`, `cold`"),
            ("disks = [\"4G\", \"lots\"]", "`lots` is not a size"),
            ("disks = \"4G\"", "expected a list"),
            ("disks = [nvmee(\"4G\")]", "did you mean `nvme`?"),
            ("disks = [4]", "a size in quotes"),
            ("memory = \"1500K\"", "whole number of MiB"),
            ("cpus = 0", "from 1 to 255"),
            ("cpus = \"2\"", "from 1 to 255"),
            ("markers = [\"vm\"]", "without quotes"),
            ("markers = [vm, vm]", "twice"),
            ("name = \"a\", name = \"b\"", "given twice"),
            ("ignore = \" \"", "this is empty"),
            ("ignore", "needs a value"),
            ("fresh_machine_id = true", "stands alone"),
            ("hostname = \"a.b\"", "`a.b` is not a hostname"),
            ("hostname = node", "a name in quotes"),
        ] {
            let found = mistakes(text);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(found[0].contains(message), "{text}: {}", found[0]);
        }
    }

    #[test]
    fn all_mistakes_are_shown_together() {
        assert_eq!(mistakes("colour = 1, cpus = 0, firmware = bios").len(), 2);
    }
}
