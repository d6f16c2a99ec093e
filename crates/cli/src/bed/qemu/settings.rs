//! What is asked of both QEMUs before a move: the switches of a variant and the limits of the cell.

use limosa_lab::qemu::{CHANNELS, QemuWay, Variant};
use serde_json::{Value, json};

/// As good as no limit: 100 GiB a second. QEMU's default is 128 MiB a second.
const BANDWIDTH_UNLIMITED: u64 = 100 << 30;
/// Room for what was sent before of all pages that a guest here rewrites: 512 MiB. The default of
/// 64 MiB would throw most of them out before they are sent again.
const XBZRLE_CACHE_BYTES: u64 = 512 << 20;

/// Arguments of `migrate-set-capabilities`.
pub(crate) fn capabilities(variant: Variant) -> Value {
    let post_copy: &[&str] = &["postcopy-ram", "postcopy-blocktime"];
    let preempt: &[&str] = &["postcopy-ram", "postcopy-blocktime", "postcopy-preempt"];
    let own: &[&str] = match variant {
        Variant::Plain => &[],
        Variant::Multifd | Variant::Zstd => &["multifd"],
        Variant::Xbzrle => &["xbzrle"],
        Variant::AutoConverge => &["auto-converge"],
        Variant::MultifdAutoConverge => &["multifd", "auto-converge"],
        Variant::PostCopy | Variant::Hybrid => post_copy,
        Variant::PostCopyPreempt | Variant::HybridPreempt => preempt,
    };
    // It tells when a pass begins and a move ends: nobody has to ask, which would be work for it.
    let all = ["events"].iter().chain(own);
    let on: Vec<Value> = all
        .map(|name| json!({ "capability": name, "state": true }))
        .collect();
    json!({ "capabilities": on })
}

/// Arguments of `migrate-set-parameters`.
pub(crate) fn parameters(way: &QemuWay, link: Option<u64>) -> Value {
    let mut all = json!({
        "max-bandwidth": link.unwrap_or(BANDWIDTH_UNLIMITED),
        // None, as of pre-copy.
        "max-postcopy-bandwidth": link.unwrap_or(0),
        "downtime-limit": way.downtime_limit_ms,
    });
    match way.variant {
        Variant::Multifd | Variant::MultifdAutoConverge => {
            all["multifd-channels"] = json!(CHANNELS);
        }
        Variant::Zstd => {
            all["multifd-channels"] = json!(CHANNELS);
            all["multifd-compression"] = json!("zstd");
        }
        Variant::Xbzrle => all["xbzrle-cache-size"] = json!(XBZRLE_CACHE_BYTES),
        _ => {}
    }
    all
}

/// When post-copy begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Switch {
    /// Never: this is pre-copy.
    Never,
    /// As soon as the move is under way.
    AtOnce,
    /// When memory was sent once.
    AfterOneRound,
}

/// The same for a variant.
pub(crate) const fn switch(variant: Variant) -> Switch {
    match variant {
        Variant::PostCopy | Variant::PostCopyPreempt => Switch::AtOnce,
        Variant::Hybrid | Variant::HybridPreempt => Switch::AfterOneRound,
        _ => Switch::Never,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(variant: Variant, link: Option<u64>, expect: &str) {
        let way = QemuWay {
            variant,
            downtime_limit_ms: 30,
            cancel_after_ms: 1000,
        };
        let names: Vec<String> = capabilities(variant)["capabilities"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["capability"].as_str().unwrap().to_owned())
            .collect();
        let text = format!("{} {}", names.join(" "), parameters(&way, link));
        assert_eq!(text, expect);
    }

    #[test]
    fn a_variant_is_a_set_of_switches() {
        check(
            Variant::Zstd,
            None,
            "events multifd {\"downtime-limit\":30,\"max-bandwidth\":107374182400,\
             \"max-postcopy-bandwidth\":0,\"multifd-channels\":4,\"multifd-compression\":\"zstd\"}",
        );
        check(
            Variant::HybridPreempt,
            Some(1000),
            "events postcopy-ram postcopy-blocktime postcopy-preempt {\"downtime-limit\":30,\
             \"max-bandwidth\":1000,\"max-postcopy-bandwidth\":1000}",
        );
        assert_eq!(switch(Variant::Plain), Switch::Never);
        assert_eq!(switch(Variant::PostCopy), Switch::AtOnce);
        assert_eq!(switch(Variant::Hybrid), Switch::AfterOneRound);
    }
}
