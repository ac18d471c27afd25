//! Reading a device's configuration space (virtio 1.2, section 2.5).

/// Copies to `data` what lies at `offset` of `space`; what lies beyond its end is zero.
pub fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    let rest = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)).unwrap_or(&[]);
    let known = rest.len().min(data.len());
    let (head, tail) = data.split_at_mut(known);
    head.copy_from_slice(&rest[..known]);
    tail.fill(0);
}
