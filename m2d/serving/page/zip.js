/** A zip of files as they are, which is right for PNGs: they are compressed already. Up to 4 GB, names in UTF-8. */

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let bit = 0; bit < 8; bit++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});
const crc32 = (bytes) => ~bytes.reduce((crc, byte) => TABLE[(crc ^ byte) & 255] ^ (crc >>> 8), -1) >>> 0;

/** A record of little-endian numbers, [bytes of each, number]. */
function record(...numbers) {
  const view = new DataView(new ArrayBuffer(numbers.reduce((sum, [size]) => sum + size, 0)));
  let at = 0;
  for (const [size, number] of numbers) {
    if (size === 2) view.setUint16(at, number, true);
    else view.setUint32(at, number, true);
    at += size;
  }
  return view.buffer;
}

/** files: [name, Blob] each. Returns a Blob. */
export async function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const [name, blob] of files) {
    const encoded = new TextEncoder().encode(name);
    const crc = crc32(new Uint8Array(await blob.arrayBuffer()));
    // Version 2.0, names in UTF-8, stored, 1 January 1980: the same images give the same zip.
    const common = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, 0x21], [4, crc], [4, blob.size], [4, blob.size]];
    const lengths = [[2, encoded.length], [2, 0]];
    const header = record([4, 0x04034b50], ...common, ...lengths);
    parts.push(header, encoded, blob);
    directory.push(record([4, 0x02014b50], [2, 20], ...common, ...lengths, [2, 0], [2, 0], [2, 0], [4, 0], [4, offset]));
    directory.push(encoded);
    offset += header.byteLength + encoded.length + blob.size;
  }
  const size = directory.reduce((sum, part) => sum + part.byteLength, 0);
  const counts = [[2, files.length], [2, files.length]];
  const end = record([4, 0x06054b50], [2, 0], [2, 0], ...counts, [4, size], [4, offset], [2, 0]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}
