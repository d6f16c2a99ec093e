//! Whether the host backs shared memory by transparent huge pages.

use std::fs;
use std::path::Path;
use std::sync::LazyLock;

const SETTINGS: &str = "/sys/kernel/mm/transparent_hugepage";

/// True if a write to a memory file may make more pages than those that are written. Read once: who
/// changes the setting while a daemon runs has to restart it.
pub(super) fn may_be_large() -> bool {
    static ANSWER: LazyLock<bool> = LazyLock::new(|| is_any_large(Path::new(SETTINGS)));
    *ANSWER
}

fn is_any_large(settings: &Path) -> bool {
    let is_large = |file: &Path| {
        let text = fs::read_to_string(file).unwrap_or_default();
        matches!(chosen_word(&text), Some("always" | "within_size" | "force"))
    };
    if is_large(&settings.join("shmem_enabled")) {
        return true;
    }
    let sizes = fs::read_dir(settings).into_iter().flatten().flatten();
    sizes
        .filter(|entry| {
            entry
                .file_name()
                .to_string_lossy()
                .starts_with("hugepages-")
        })
        .any(|entry| is_large(&entry.path().join("shmem_enabled")))
}

/// The word in brackets: of those that a setting of the kernel can have, the one that it has.
pub fn chosen_word(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(all: &str, one_size: &str, expect: bool) {
        let directory = tempfile::tempdir().unwrap();
        let size = directory.path().join("hugepages-64kB");
        fs::create_dir(&size).unwrap();
        fs::write(directory.path().join("shmem_enabled"), all).unwrap();
        fs::write(size.join("shmem_enabled"), one_size).unwrap();
        assert_eq!(is_any_large(directory.path()), expect, "{all} {one_size}");
    }

    #[test]
    fn settings_are_read() {
        let never = "always within_size advise [never] deny force\n";
        check(never, "always inherit within_size advise [never]\n", false);
        check(never, "always [inherit] within_size advise never\n", false);
        check(never, "[always] inherit within_size advise never\n", true);
        check("[always] within_size advise never deny force\n", "", true);
        check("always [within_size] advise never deny force\n", "", true);
        check("always within_size [advise] never deny force\n", "", false);
        assert!(!is_any_large(Path::new("/nonexistent")));
    }
}
