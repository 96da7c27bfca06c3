//! The innermost 32 x 32 tile, by the matrix unit of the processor.

use std::arch::asm;

use super::super::kernel::Sums;
use super::super::level::SimdLevel;

/// Rows and columns of a tile of the output: two by two registers of 16 x 16 sums.
pub(in crate::device::cpu) const SIDE: usize = 32;
/// K of one step: what one instruction multiplies.
pub(in crate::device::cpu) const STEP: usize = 32;

/// Rows of the left operand, in bytes: a row holds a step's K in 64 bytes.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Left {
    pub(in crate::device::cpu) pointer: *const u8,
    pub(in crate::device::cpu) row_stride: usize,
    pub(in crate::device::cpu) step_stride: usize,
}

// SAFETY: what it points to is only read while tasks share it.
unsafe impl Sync for Left {}

/// A way to multiply packed tiles.
pub(in crate::device::cpu) trait Tiles {
    /// The instructions that it needs, which the epilogue may use as well.
    const LEVEL: SimdLevel;

    /// Prepares the thread for [`Tiles::multiply`].
    ///
    /// # Safety
    /// The processor has the instructions, and the operating system lets this process use them.
    unsafe fn begin();

    /// Ends what [`Tiles::begin`] began.
    ///
    /// # Safety
    /// As for [`Tiles::begin`].
    unsafe fn end();

    /// Sums over all steps, in order, and stores; rows and columns from 16 on are left out if they are not `used`.
    ///
    /// # Safety
    /// The thread is prepared; the operands may be read for `steps` steps of `used` rows and 32 columns, the latter packed
    /// in pairs of k; sums of `used` rows and columns, rounded up to 16, may be written, and read if they are added to.
    unsafe fn multiply(steps: usize, left: Left, right: *const u8, sums: Sums, used: (usize, usize));
}

/// The tile registers of AMX. No compiler or library uses them unless told to, so what is configured stays from
/// `begin` to `end`, which are both within one run of a task on one thread; the system saves them with the thread.
pub(in crate::device::cpu) struct Amx;

/// What `ldtilecfg` reads: palette 1, and 16 rows of 64 bytes for each of the eight registers.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// One micro-tile: sums cleared or loaded, the body once a step, sums stored.
macro_rules! multiply {
    ($steps:ident, $left:ident, $right:ident, $sums:ident, zero: [$($zero:literal),*], load: [$($load:literal),*],
     body: [$($body:literal),*], store: [$($store:literal),*]) => {{
        let left_lower = $left.pointer.wrapping_add(16 * $left.row_stride);
        let sums_lower = $sums.pointer.wrapping_add(16 * $sums.stride);
        // SAFETY: the caller of the enclosing function grants every byte that is read and written, and a configuration
        // of 16 rows of 64 bytes. The registers are declared, so nothing is expected to survive in them.
        unsafe {
            asm!(
                "test {add}, {add}",
                "jnz 3f",
                $($zero,)*
                "jmp 2f",
                "3:",
                $($load,)*
                "2:",
                $($body,)*
                "add {left}, {left_step}",
                "add {left_lower}, {left_step}",
                "add {right}, 2048",
                "dec {steps}",
                "jnz 2b",
                $($store,)*
                add = in(reg) usize::from($sums.add),
                left = inout(reg) $left.pointer => _,
                left_lower = inout(reg) left_lower => _,
                left_stride = in(reg) $left.row_stride,
                left_step = in(reg) $left.step_stride,
                right = inout(reg) $right => _,
                right_stride = in(reg) 128usize,
                sums = in(reg) $sums.pointer,
                sums_lower = in(reg) sums_lower,
                sums_stride = in(reg) $sums.stride * 4,
                steps = inout(reg) $steps => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }};
}

impl Tiles for Amx {
    const LEVEL: SimdLevel = SimdLevel::Avx512Amx;

    unsafe fn begin() {
        // SAFETY: granted by the caller; the configuration is 64 bytes.
        unsafe {
            asm!(
                "ldtilecfg [{}]", in(reg) &raw const CONFIGURATION,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, readonly, preserves_flags),
            );
        }
    }

    unsafe fn end() {
        // SAFETY: granted by the caller.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem, preserves_flags),
            );
        }
    }

    unsafe fn multiply(steps: usize, left: Left, right: *const u8, sums: Sums, used: (usize, usize)) {
        if steps == 0 {
            return;
        }
        match (used.0 > 16, used.1 > 16) {
            (true, true) => multiply!(steps, left, right, sums,
            zero: ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
            load: [
                "tileloadd tmm0, [{sums} + 1*{sums_stride}]", "tileloadd tmm1, [{sums} + 1*{sums_stride} + 64]",
                "tileloadd tmm2, [{sums_lower} + 1*{sums_stride}]",
                "tileloadd tmm3, [{sums_lower} + 1*{sums_stride} + 64]"
            ],
            body: [
                "tileloadd tmm6, [{right} + 1*{right_stride}]", "tileloadd tmm4, [{left} + 1*{left_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + 1*{right_stride} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left_lower} + 1*{left_stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7"
            ],
            store: [
                "tilestored [{sums} + 1*{sums_stride}], tmm0", "tilestored [{sums} + 1*{sums_stride} + 64], tmm1",
                "tilestored [{sums_lower} + 1*{sums_stride}], tmm2",
                "tilestored [{sums_lower} + 1*{sums_stride} + 64], tmm3"
            ]),
            (true, false) => multiply!(steps, left, right, sums,
            zero: ["tilezero tmm0", "tilezero tmm2"],
            load: [
                "tileloadd tmm0, [{sums} + 1*{sums_stride}]", "tileloadd tmm2, [{sums_lower} + 1*{sums_stride}]"
            ],
            body: [
                "tileloadd tmm6, [{right} + 1*{right_stride}]", "tileloadd tmm4, [{left} + 1*{left_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{left_lower} + 1*{left_stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6"
            ],
            store: [
                "tilestored [{sums} + 1*{sums_stride}], tmm0", "tilestored [{sums_lower} + 1*{sums_stride}], tmm2"
            ]),
            (false, true) => multiply!(steps, left, right, sums,
            zero: ["tilezero tmm0", "tilezero tmm1"],
            load: [
                "tileloadd tmm0, [{sums} + 1*{sums_stride}]", "tileloadd tmm1, [{sums} + 1*{sums_stride} + 64]"
            ],
            body: [
                "tileloadd tmm6, [{right} + 1*{right_stride}]", "tileloadd tmm4, [{left} + 1*{left_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + 1*{right_stride} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7"
            ],
            store: [
                "tilestored [{sums} + 1*{sums_stride}], tmm0", "tilestored [{sums} + 1*{sums_stride} + 64], tmm1",
                "/* {sums_lower} */"
            ]),
            (false, false) => multiply!(steps, left, right, sums,
                zero: ["tilezero tmm0"],
                load: ["tileloadd tmm0, [{sums} + 1*{sums_stride}]"],
                body: [
                    "tileloadd tmm6, [{right} + 1*{right_stride}]", "tileloadd tmm4, [{left} + 1*{left_stride}]",
                    "tdpbf16ps tmm0, tmm4, tmm6"
                ],
                store: ["tilestored [{sums} + 1*{sums_stride}], tmm0", "/* {sums_lower} */"]),
        }
    }
}

/// Whether the processor has the instructions and the operating system lets this process use them; asks the latter for
/// permission, which covers all threads.
pub(in crate::device::cpu::gemm) fn is_permitted() -> bool {
    static PERMITTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *PERMITTED.get_or_init(|| has_instructions() && request_permission())
}

/// Processor Programming Reference: leaf 7 EDX bit 22 is AMX-BF16, bit 24 AMX-TILE; XCR0 bits 17 and 18 are the state.
fn has_instructions() -> bool {
    const INSTRUCTIONS: u32 = 1 << 22 | 1 << 24;
    const OS_XSAVE: u32 = 1 << 27;
    const STATE: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: the caller saw that the operating system enabled the instruction.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    let leaf = std::arch::x86_64::__cpuid_count;
    if leaf(0, 0).eax < 7 || leaf(1, 0).ecx & OS_XSAVE == 0 || leaf(7, 0).edx & INSTRUCTIONS != INSTRUCTIONS {
        return false;
    }
    // SAFETY: XSAVE is enabled.
    unsafe { enabled_state() & STATE == STATE }
}

#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    // From the kernel's documentation of dynamically enabled features (arch/x86/xstate).
    const ARCH_PRCTL: isize = 158;
    const REQUEST_PERMISSION: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let result: isize;
    // SAFETY: the call reads no memory of ours, and a permission changes nothing until it is used.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}
