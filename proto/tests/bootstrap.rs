//! The generated code in `src/gen` is what the `.proto` files say. After changing one:
//! `UNDERSTUDY_REGENERATE=1 cargo test -p understudy-proto --test bootstrap`

use std::path::Path;

const PROTOS: [&str; 4] = [
    "understudy/epoch/v1/epoch.proto",
    "understudy/admin/v1/admin.proto",
    "understudy/witness/v1/witness.proto",
    "understudy/owner/v1/owner.proto",
];

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let out = tempfile::tempdir().unwrap();
    let descriptors = protox::compile(PROTOS, [root.join("proto")]).unwrap();
    tonic_prost_build::configure()
        .bytes(".")
        .out_dir(out.path())
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)
        .unwrap();
    let committed_dir = root.join("src/gen");
    for entry in std::fs::read_dir(out.path()).unwrap() {
        let entry = entry.unwrap();
        let committed = committed_dir.join(entry.file_name());
        let generated = std::fs::read_to_string(entry.path()).unwrap();
        if std::env::var_os("UNDERSTUDY_REGENERATE").is_some() {
            std::fs::write(&committed, &generated).unwrap();
        }
        let current = std::fs::read_to_string(&committed).unwrap_or_default();
        assert!(
            current == generated,
            "{} is not what the .proto files generate; run this test with UNDERSTUDY_REGENERATE=1",
            committed.display()
        );
    }
}
