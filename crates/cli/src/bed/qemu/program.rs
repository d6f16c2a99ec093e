//! Which QEMU is used, and whether there is one.

use anyhow::{Context, bail, ensure};
use std::path::Path;
use std::process::{Command, Stdio};

/// The name under which distributions install it.
pub(crate) const USUAL: &str = "qemu-system-x86_64";

/// What to do where there is none.
const ADVICE: &str = "on Debian install qemu-system-x86 and qemu-system-data (on bookworm those of \
                      bookworm-backports), or name one with --qemu PATH";

/// Makes sure that it can be started.
///
/// # Errors
/// It cannot, with what to do.
pub(crate) fn check(program: &Path) -> anyhow::Result<()> {
    let shown = program.display();
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("this plan needs QEMU, and there is no {shown}: {ADVICE}")
        }
        Err(error) => return Err(error).with_context(|| format!("cannot start {shown}")),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.starts_with("QEMU"),
        "{shown} is no QEMU: {ADVICE}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_is_told_with_what_to_install() {
        let said = check(Path::new("/nonexistent/qemu"))
            .unwrap_err()
            .to_string();
        assert!(said.contains("there is no /nonexistent/qemu: on Debian install qemu-system-x86"));
        let said = check(Path::new("/bin/echo")).unwrap_err().to_string();
        assert!(said.contains("/bin/echo is no QEMU"), "{said}");
    }
}
