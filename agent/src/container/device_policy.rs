//! Which devices a container may use: `linux.resources.devices` as a small BPF program on
//! its control group.
//!
//! Containers may have CAP_MKNOD, so without this one could make itself a node for the
//! disk of another and write past its file system. libcontainer's own implementation
//! would bring in libbpf, libelf and zlib for a program of a few instructions.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libcontainer::oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};

use crate::error::{Error, Result};

const MKNOD: u32 = 1;
const READ: u32 = 2;
const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;
const BLOCK: u32 = 1;
const CHARACTER: u32 = 2;

/// Devices that every container may use, by number: what its /dev holds, and terminals.
const ALWAYS: [(u32, Option<u32>); 8] = [
    (1, Some(3)), // null
    (1, Some(5)), // zero
    (1, Some(7)), // full
    (1, Some(8)), // random
    (1, Some(9)), // urandom
    (5, Some(0)), // tty
    (5, Some(2)), // ptmx
    (136, None),  // pts/*
];

/// One rule; what it does not name it applies to all of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<u32>,
    major: Option<u32>,
    minor: Option<u32>,
    access: u32,
}

impl Rule {
    fn is_everything(&self) -> bool {
        self.allow && self.kind.is_none() && self.access == ALL && self.major.is_none()
    }
}

/// Whether these are the limits of a privileged container, which may use every device.
pub fn allows_everything(resources: &LinuxResources) -> bool {
    let last = resources.devices().as_deref().unwrap_or_default().last();
    last.and_then(|device| rule(device).ok()).is_some_and(|rule| rule.is_everything())
}

/// Attaches the policy of `devices` to the control group opened as `cgroup`. The last
/// rule that matches decides; where none does, access is denied.
pub fn attach(cgroup: &File, devices: &[LinuxDeviceCgroup]) -> Result<()> {
    let rules = rules(devices)?;
    if rules.last().is_some_and(|rule| *rule == Rule { allow: true, kind: None, major: None, minor: None, access: ALL })
    {
        return Ok(());
    }
    let program =
        load(&compile(&rules)).map_err(Error::system("load the device policy (the kernel needs CGROUP_BPF)"))?;
    attach_program(cgroup, &program).map_err(Error::system("attach the device policy"))
}

/// The request's rules, then those that hold for every container. A list that ends with
/// the permission for everything is that of a privileged container.
fn rules(devices: &[LinuxDeviceCgroup]) -> Result<Vec<Rule>> {
    let given = devices.iter().map(rule).collect::<Result<Vec<_>>>()?;
    if given.last().is_some_and(Rule::is_everything) {
        return Ok(given);
    }
    let make = |kind| Rule { allow: true, kind: Some(kind), major: None, minor: None, access: MKNOD };
    let always = ALWAYS.map(|(major, minor)| Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        access: ALL,
    });
    // Making a node gives no access to the device behind it.
    Ok(given.into_iter().chain([make(CHARACTER), make(BLOCK)]).chain(always).collect())
}

fn rule(device: &LinuxDeviceCgroup) -> Result<Rule> {
    let invalid = |reason: String| Error::invalid("spec_json: linux.resources.devices", reason);
    let kind = match device.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => return Err(invalid("a FIFO is no device".into())),
    };
    // A negative number has meant "all" since before the field was optional.
    let number = |number: Option<i64>| match number {
        Some(number) if number >= 0 => {
            u32::try_from(number).map(Some).map_err(|_| invalid(format!("{number} is no device number")))
        }
        _ => Ok(None),
    };
    let mut access = 0;
    for letter in device.access().as_deref().unwrap_or("rwm").chars() {
        access |= match letter {
            'r' => READ,
            'w' => WRITE,
            'm' => MKNOD,
            _ => return Err(invalid(format!("{letter:?} is not an access of r, w, m"))),
        };
    }
    Ok(Rule { allow: device.allow(), kind, major: number(device.major())?, minor: number(device.minor())?, access })
}

/// One instruction: operation, registers, jump offset, immediate value.
type Instruction = [u8; 8];

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const MOVE_VALUE: u8 = 0xb4; // BPF_ALU | BPF_MOV | BPF_K
const AND_VALUE: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_IF_EQUAL: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_UNLESS_EQUAL: u8 = 0x55; // BPF_JMP | BPF_JNE | BPF_K
const EXIT: u8 = 0x95; // BPF_JMP | BPF_EXIT

const CONTEXT: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const RESULT: u8 = 0;
const SCRATCH: u8 = 6;

fn instruction(operation: u8, target: u8, source: u8, offset: u16, value: u32) -> Instruction {
    let [o0, o1] = offset.to_le_bytes();
    let [v0, v1, v2, v3] = value.to_le_bytes();
    [operation, target | source << 4, o0, o1, v0, v1, v2, v3]
}

/// The program: each rule, the last first, decides or falls through to the one before.
fn compile(rules: &[Rule]) -> Vec<Instruction> {
    let mut program = vec![
        // The context is three words: access << 16 | kind, major, minor.
        instruction(LOAD_WORD, KIND, CONTEXT, 0, 0),
        instruction(MOVE, ACCESS, KIND, 0, 0),
        instruction(AND_VALUE, KIND, 0, 0, 0xffff),
        instruction(SHIFT_RIGHT, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, CONTEXT, 4, 0),
        instruction(LOAD_WORD, MINOR, CONTEXT, 8, 0),
    ];
    for rule in rules.iter().rev() {
        // Pairs of a test's operation and operands; each test that fails skips the rest.
        let mut tests = Vec::new();
        let equal = |register, value| instruction(JUMP_UNLESS_EQUAL, register, 0, 0, value);
        tests.extend(rule.kind.map(|kind| equal(KIND, kind)));
        tests.extend(rule.major.map(|major| equal(MAJOR, major)));
        tests.extend(rule.minor.map(|minor| equal(MINOR, minor)));
        if rule.allow {
            // All that is wanted must be allowed by this rule,
            tests.push(instruction(MOVE, SCRATCH, ACCESS, 0, 0));
            tests.push(instruction(AND_VALUE, SCRATCH, 0, 0, ALL & !rule.access));
            tests.push(equal(SCRATCH, 0));
        } else {
            // but any of it may be denied.
            tests.push(instruction(MOVE, SCRATCH, ACCESS, 0, 0));
            tests.push(instruction(AND_VALUE, SCRATCH, 0, 0, rule.access));
            tests.push(instruction(JUMP_IF_EQUAL, SCRATCH, 0, 0, 0));
        }
        let verdict = [instruction(MOVE_VALUE, RESULT, 0, 0, u32::from(rule.allow)), instruction(EXIT, 0, 0, 0, 0)];
        let length = tests.len() + verdict.len();
        for (index, test) in tests.iter_mut().enumerate() {
            if matches!(test[0], JUMP_IF_EQUAL | JUMP_UNLESS_EQUAL) {
                let skip = u16::try_from(length - index - 1).unwrap_or(0);
                [test[2], test[3]] = skip.to_le_bytes();
            }
        }
        program.extend(tests);
        program.extend(verdict);
    }
    program.push(instruction(MOVE_VALUE, RESULT, 0, 0, 0));
    program.push(instruction(EXIT, 0, 0, 0, 0));
    program
}

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The leading fields of `union bpf_attr` for BPF_PROG_LOAD.
#[repr(C)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
}

/// The leading fields of `union bpf_attr` for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
    };
    // SAFETY: the attributes, and the program and string they point to, outlive the call,
    // and the length is theirs; the kernel copies what it keeps.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attributes, size_of::<LoadAttributes>()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn attach_program(cgroup: &File, program: &OwnedFd) -> io::Result<()> {
    let number = |fd: i32| u32::try_from(fd).map_err(io::Error::other);
    let attributes = AttachAttributes {
        target: number(cgroup.as_raw_fd())?,
        program: number(program.as_raw_fd())?,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the attributes outlive the call and the length is theirs.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attributes, size_of::<AttachAttributes>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Runs a program as the kernel would, for the few operations it is made of.
    fn run(program: &[Instruction], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        let context = [access << 16 | kind, major, minor];
        let mut registers = [0u32; 11];
        let mut at = 0;
        loop {
            let [operation, operands, o0, o1, v0, v1, v2, v3] = program[at];
            let (target, source) = (usize::from(operands & 15), usize::from(operands >> 4));
            let offset = usize::from(u16::from_le_bytes([o0, o1]));
            let value = u32::from_le_bytes([v0, v1, v2, v3]);
            at += 1;
            match operation {
                LOAD_WORD => registers[target] = context[offset / 4],
                MOVE => registers[target] = registers[source],
                MOVE_VALUE => registers[target] = value,
                AND_VALUE => registers[target] &= value,
                SHIFT_RIGHT => registers[target] >>= value,
                JUMP_IF_EQUAL => at += if registers[target] == value { offset } else { 0 },
                JUMP_UNLESS_EQUAL => at += if registers[target] != value { offset } else { 0 },
                EXIT => return registers[0] != 0,
                _ => panic!("operation {operation:#x}"),
            }
        }
    }

    /// What the rules mean, said plainly.
    fn allowed(rules: &[Rule], kind: u32, access: u32, major: u32, minor: u32) -> bool {
        for rule in rules.iter().rev() {
            let same = |wanted: Option<u32>, found| wanted.is_none_or(|wanted| wanted == found);
            let device = same(rule.kind, kind) && same(rule.major, major) && same(rule.minor, minor);
            let matches = if rule.allow { access & !rule.access == 0 } else { access & rule.access != 0 };
            if device && matches {
                return rule.allow;
            }
        }
        false
    }

    fn any_rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(0u32..3);
        (any::<bool>(), proptest::option::of(1u32..3), number(), number(), 1u32..8)
            .prop_map(|(allow, kind, major, minor, access)| Rule { allow, kind, major, minor, access })
    }

    proptest! {
        #[test]
        fn the_program_means_what_the_rules_say(rules in proptest::collection::vec(any_rule(), 0..12),
                                                kind in 1u32..3, access in 1u32..8, major in 0u32..3, minor in 0u32..3) {
            let program = compile(&rules);
            prop_assert_eq!(run(&program, kind, access, major, minor), allowed(&rules, kind, access, major, minor));
        }
    }

    fn parse(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_plain_container_gets_its_basic_devices_and_no_disk() {
        let program = compile(&rules(&parse(r#"[{"allow": false, "access": "rwm"}]"#)).unwrap());
        assert!(run(&program, CHARACTER, READ | WRITE, 1, 3), "null");
        assert!(run(&program, CHARACTER, READ | WRITE, 136, 77), "pts/77");
        assert!(run(&program, BLOCK, MKNOD, 254, 0), "making a node is harmless");
        assert!(!run(&program, BLOCK, READ, 254, 0), "reading a disk is not");
        assert!(!run(&program, CHARACTER, READ, 1, 1), "nor is memory");
        assert_eq!(rules(&[]).unwrap().len(), rules(&parse(r#"[{"allow": false}]"#)).unwrap().len() - 1);
    }

    #[test]
    fn a_privileged_container_has_no_policy_and_a_listed_device_is_usable() {
        let privileged =
            rules(&parse(r#"[{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]"#)).unwrap();
        assert!(allowed(&privileged, BLOCK, READ | WRITE, 254, 0));
        assert_eq!(privileged.len(), 2);
        let listed = parse(
            r#"[{"allow": false, "access": "rwm"}, {"allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw"}]"#,
        );
        let program = compile(&rules(&listed).unwrap());
        assert!(run(&program, CHARACTER, READ | WRITE, 10, 229));
        assert!(!run(&program, CHARACTER, READ | WRITE, 10, 200));
    }

    #[test]
    fn nonsense_is_refused() {
        for json in [
            r#"[{"allow": true, "access": "x"}]"#,
            r#"[{"allow": true, "type": "p"}]"#,
            r#"[{"allow": true, "major": 5000000000}]"#,
        ] {
            assert!(rules(&parse(json)).is_err(), "{json}");
        }
    }

    #[test]
    fn the_kernel_takes_the_program() {
        // Needs privileges the tests may lack; the verifier's own complaint is EINVAL or EACCES.
        match load(&compile(&rules(&[]).unwrap())) {
            Ok(_) => {}
            Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS)), "{error}"),
        }
    }
}
