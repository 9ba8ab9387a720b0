//! placeholder
/// What executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccelKind { /// kvm
 Kvm, /// tcg
 Tcg }
impl AccelKind {
    /// s
    pub fn as_str(self) -> &'static str { match self { Self::Kvm => "kvm", Self::Tcg => "tcg" } }
    /// c
    pub fn cpu(self) -> &'static str { match self { Self::Kvm => "host", Self::Tcg => "max" } }
}
