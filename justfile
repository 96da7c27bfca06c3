# Short names for what is done often. https://just.systems

# List the recipes.
default:
    @just --list

# What must be green before a merge.
check:
    .ci/run

# Tests; `just test checkpoint` runs those with that word in their name.
test *words:
    cargo test --workspace -- {{words}}

# Format, then let clippy mend what it can.
tidy:
    cargo fmt
    cargo clippy --workspace --all-targets --fix --allow-dirty --allow-staged -- -D warnings

# Documentation of all crates, in the browser.
doc:
    cargo doc --workspace --no-deps --open

# Licences, advisories and sources of the dependencies (needs cargo-deny).
deny:
    cargo deny check
