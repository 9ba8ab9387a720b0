//! The function as it was, and a constant that registers it.

use crate::args::{Args, Disk, Machine};
use proc_macro2::{Ident, Span, TokenStream};
use quote::{ToTokens, quote, quote_spanned};
use syn::{Error, ItemFn, Result, Signature};

/// Expands `#[scenario(arguments)] item`.
pub(crate) fn scenario(arguments: TokenStream, item: TokenStream) -> Result<TokenStream> {
    let function: ItemFn = syn::parse2(item)
        .map_err(|error| Error::new(error.span(), "#[scenario] stands before a function"))?;
    check(&function.sig)?;
    let args = Args::parse(arguments)?;
    let ident = &function.sig.ident;
    let has_machine = !function.sig.inputs.is_empty();
    if let (false, Some(key)) = (has_machine, &args.machine_key) {
        let message = format!("`{key}` describes a machine: give the function a parameter `vm: &mut Vm`");
        return Err(Error::new(key.span(), message));
    }
    let last = args.name.as_ref().map_or_else(|| ident.to_string(), |name| name.value());
    let mut markers: Vec<String> = args.markers.iter().map(ToString::to_string).collect();
    if has_machine && !markers.iter().any(|marker| marker == "vm") {
        markers.insert(0, "vm".into());
    }
    let machine = if has_machine { some(needs(&args.machine)) } else { none() };
    let timeout = match args.timeout_ms {
        Some(ms) => some(quote!(::core::time::Duration::from_millis(#ms))),
        None => none(),
    };
    let ignore = args.ignore.map_or_else(none, some);
    // Spanned at the function, so that a wrong parameter or return type is shown there.
    let body = if has_machine {
        quote_spanned!(ident.span()=> Vm(|vm| ::shakedown::__private::IntoResult::into_result(#ident(vm))))
    } else {
        quote_spanned!(ident.span()=> Plain(|| ::shakedown::__private::IntoResult::into_result(#ident())))
    };
    let cfgs = function.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    Ok(quote! {
        #function

        #(#cfgs)*
        const _: () = {
            #[::shakedown::__private::linkme::distributed_slice(::shakedown::__private::SCENARIOS)]
            #[linkme(crate = ::shakedown::__private::linkme)]
            static SCENARIO: ::shakedown::harness::Scenario = ::shakedown::harness::Scenario {
                name: ::shakedown::__private::without_crate(::core::concat!(::core::module_path!(), "::", #last)),
                markers: &[#(#markers),*],
                machine: #machine,
                timeout: #timeout,
                ignore: #ignore,
                file: ::core::file!(),
                line: ::core::line!(),
                body: ::shakedown::harness::Body::#body,
            };
        };
    })
}

fn check(signature: &Signature) -> Result<()> {
    let refuse =
        |tokens: &dyn ToTokens, message: &str| Err(Error::new_spanned(tokens.to_token_stream(), message));
    if let Some(token) = &signature.asyncness {
        return refuse(token, "a scenario blocks: it cannot be async");
    }
    if let Some(token) = &signature.unsafety {
        return refuse(token, "a scenario cannot be unsafe");
    }
    if !signature.generics.params.is_empty() {
        return refuse(&signature.generics, "a scenario cannot be generic");
    }
    match signature.inputs.iter().nth(1) {
        Some(second) => refuse(second, "a scenario has one parameter, `vm: &mut Vm`, or none"),
        None => Ok(()),
    }
}

fn needs(machine: &Machine) -> TokenStream {
    let vm = quote!(::shakedown::vm);
    let word = |kind: &str, variant: &Option<Ident>, default: &str| {
        let kind = Ident::new(kind, Span::call_site());
        let variant = variant.clone().unwrap_or_else(|| Ident::new(default, Span::call_site()));
        quote!(#vm::#kind::#variant)
    };
    let image = machine.image.as_ref().map_or_else(none, some);
    let boot = word("Boot", &machine.boot, "Fork");
    let medium = word("Medium", &machine.medium, "Kernel");
    let firmware = word("Firmware", &machine.firmware, "Bios");
    let disks = machine
        .disks
        .iter()
        .map(|Disk { bytes, bus }| quote!(#vm::DiskNeed { bytes: #bytes, bus: #vm::Bus::#bus }));
    let memory = machine.memory_mib.map_or_else(|| quote!(#vm::Needs::DEFAULT.memory_mib), literal);
    let hostname = machine.hostname.as_ref().map_or_else(none, some);
    let (fresh_machine_id, reboots) = (machine.fresh_machine_id, machine.reboots);
    let cpus = machine.cpus.map_or_else(|| quote!(#vm::Needs::DEFAULT.cpus), literal);
    quote! {
        #vm::Needs {
            image: #image,
            boot: #boot,
            medium: #medium,
            firmware: #firmware,
            disks: &[#(#disks),*],
            memory_mib: #memory,
            cpus: #cpus,
            hostname: #hostname,
            fresh_machine_id: #fresh_machine_id,
            reboots: #reboots,
        }
    }
}

fn literal(number: u32) -> TokenStream {
    quote!(#number)
}

fn some(value: impl ToTokens) -> TokenStream {
    quote!(::core::option::Option::Some(#value))
}

fn none() -> TokenStream {
    quote!(::core::option::Option::None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expand(arguments: &str, item: &str) -> Result<String> {
        let tokens = |text: &str| text.parse::<TokenStream>().expect("tokens");
        let expanded = scenario(tokens(arguments), tokens(item))?;
        Ok(syn::parse2::<syn::File>(expanded)?.into_token_stream().to_string())
    }

    #[test]
    fn the_parameter_decides_whether_there_is_a_machine() {
        let plain = expand("markers = [slow]", "fn f() {}").expect("expands");
        assert!(plain.contains("Body :: Plain") && plain.contains(r#"markers : & ["slow"]"#), "{plain}");
        let vm = expand("markers = [slow]", "fn f(vm: &mut Vm) -> Result<()> { Ok(()) }").expect("expands");
        assert!(vm.contains("Body :: Vm") && vm.contains(r#"markers : & ["vm" , "slow"]"#), "{vm}");
    }

    #[test]
    fn a_cfg_covers_the_registration_too() {
        let text = expand("", r#"#[cfg(feature = "x")] fn f() {}"#).expect("expands");
        assert_eq!(text.matches(r#"feature = "x""#).count(), 2, "{text}");
    }

    #[test]
    fn what_cannot_be_a_scenario_is_refused() {
        for (arguments, item, message) in [
            ("", "struct S;", "before a function"),
            ("", "async fn f() {}", "cannot be async"),
            ("", "unsafe fn f() {}", "cannot be unsafe"),
            ("", "fn f<T>(vm: T) {}", "cannot be generic"),
            ("", "fn f(a: &mut Vm, b: &mut Vm) {}", "one parameter"),
            ("memory = \"2G\"", "fn f() {}", "`memory` describes a machine"),
        ] {
            let error = expand(arguments, item).expect_err(item).to_string();
            assert!(error.contains(message), "{item}: {error}");
        }
    }
}
