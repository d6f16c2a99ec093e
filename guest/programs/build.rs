//! How the programs are linked: static, at a fixed address, without start files or libraries.

fn main() {
    let programs = concat!(env!("CARGO_MANIFEST_DIR"), "/link.ld");
    let start = concat!(env!("CARGO_MANIFEST_DIR"), "/pvh.ld");
    for (bin, script) in [
        ("writer", programs),
        ("idle", programs),
        ("compute", programs),
        ("kv", programs),
        ("pvh", start),
    ] {
        println!("cargo::rerun-if-changed={script}");
        println!("cargo::rustc-link-arg-bin={bin}=-Wl,-T,{script}");
    }
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        // The last word on position independence is the linker's: no relocation is left.
        "-no-pie",
        "-Wl,--build-id=none",
        "-Wl,--no-eh-frame-hdr",
        "-Wl,-z,norelro",
        "-Wl,-z,max-page-size=4096",
    ] {
        println!("cargo::rustc-link-arg-bins={argument}");
    }
}
