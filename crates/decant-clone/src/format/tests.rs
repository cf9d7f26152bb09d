use decant_base::ExtentSet;
use expect_test::expect;

use crate::blocks::BlockMap;
use crate::file::{Identity, MapError, MapFile, Scope};
use crate::shape::Shape;

fn identity(sector_size: u32) -> Identity {
    let shape = Shape::new(100 << 20, sector_size).unwrap();
    Identity { volume: "orders".into(), shape, epoch: Some(7), boot: "5f0e2b1c-0000-4000-8000-123456789abc".into() }
}

/// A map file in memory.
struct File(Vec<u8>);

impl File {
    fn write(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        self.0.resize(self.0.len().max(end), 0);
        self.0[at as usize..end].copy_from_slice(bytes);
    }

    fn open(&self, identity: &Identity) -> Result<(MapFile, BlockMap, crate::file::Found), MapError> {
        let mut data = ExtentSet::new();
        data.insert(0..self.0.len() as u64);
        let mut read = |at: u64, buffer: &mut [u8]| {
            buffer.fill(0);
            let start = (at as usize).min(self.0.len());
            let bytes = &self.0[start..(start + buffer.len()).min(self.0.len())];
            buffer[..bytes.len()].copy_from_slice(bytes);
            Ok(())
        };
        MapFile::open(&mut read, self.0.len() as u64, &data, identity)
    }
}

fn example(sector_size: u32) -> File {
    let live: ExtentSet = [(1u64, 9u64), (20_000, 3)].into_iter().map(decant_base::Extent::from).collect();
    let (mut file, writes) = MapFile::create(&identity(sector_size), &live);
    let mut disk = File(Vec::new());
    for (at, bytes) in writes {
        disk.write(at, &bytes);
    }
    disk.0.resize(file.length(identity(sector_size).shape) as usize, 0);
    let mut map = BlockMap::new(identity(sector_size).shape, live);
    map.mark_fetched(1..4);
    map.mark_written(&(16..24));
    map.mark_discarded(&(40..48));
    if sector_size == 512 {
        map.mark_written(&(50..52));
    }
    let update = file.begin_update(|superblock| crate::file::set_intent(superblock, 0));
    disk.write(update.offset, &update.bytes[..]);
    file.end_update();
    let commit = file.begin_commit(&mut map, Scope::All).unwrap();
    for write in &commit.writes {
        disk.write(write.offset, &write.bytes[..]);
    }
    file.end_commit(commit);
    disk
}

fn hex(bytes: &[u8]) -> String {
    let mut out = String::new();
    for (row, line) in bytes.chunks(16).enumerate() {
        if line.iter().any(|&byte| byte != 0) {
            out += &format!("{:06x}", row * 16);
            line.iter().for_each(|byte| out += &format!(" {byte:02x}"));
            out.push('\n');
        }
    }
    out
}

#[test]
fn golden_bytes_4096() {
    expect![[r#"
        000000 44 45 43 41 4e 54 4d 50 01 00 00 00 00 00 00 00
        000010 01 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
        000020 6f 72 64 65 72 73 00 00 00 00 00 00 00 00 00 00
        000060 00 00 40 06 00 00 00 00 00 10 00 00 02 00 00 00
        000070 07 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00
        000080 78 ae 2d cb 0e 00 00 00 35 66 30 65 32 62 31 63
        000090 2d 30 30 30 30 2d 34 30 30 30 2d 38 30 30 30 2d
        0000a0 31 32 33 34 35 36 37 38 39 61 62 63 00 00 00 00
        000ff0 00 00 00 00 00 00 00 00 00 00 00 00 e1 c8 e0 8e
        001000 44 45 43 41 4e 54 4d 50 01 00 00 00 00 00 00 00
        001010 02 00 00 00 00 00 00 00 01 00 00 00 00 00 00 00
        001020 6f 72 64 65 72 73 00 00 00 00 00 00 00 00 00 00
        001060 00 00 40 06 00 00 00 00 00 10 00 00 02 00 00 00
        001070 07 00 00 00 00 00 00 00 02 00 00 00 00 00 00 00
        001080 78 ae 2d cb 0e 00 00 00 35 66 30 65 32 62 31 63
        001090 2d 30 30 30 30 2d 34 30 30 30 2d 38 30 30 30 2d
        0010a0 31 32 33 34 35 36 37 38 39 61 62 63 00 00 00 00
        001200 01 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00
        001ff0 00 00 00 00 00 00 00 00 00 00 00 00 e3 85 1f 72
        002000 01 00 00 00 00 00 00 00 09 00 00 00 00 00 00 00
        002010 20 4e 00 00 00 00 00 00 03 00 00 00 00 00 00 00
        003000 44 43 50 47 47 05 8f 30 01 00 00 00 00 00 00 00
        003040 67 0c f0 ff ff ff ff ff ff ff ff ff ff ff ff ff
        003050 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003060 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003070 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003080 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003090 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0030a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0030b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0030c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0030d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0030e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0030f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003100 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003110 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003120 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003130 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003140 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003150 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003160 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003170 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003180 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003190 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0031a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0031b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0031c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0031d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0031e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0031f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003200 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003210 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003220 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003230 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003240 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003250 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003260 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003270 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003280 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003290 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0032a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0032b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0032c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0032d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0032e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0032f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003300 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003310 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003320 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003330 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003340 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003350 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003360 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003370 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003380 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003390 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0033a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0033b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0033c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0033d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0033e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0033f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003400 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003410 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003420 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003430 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003440 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003450 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003460 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003470 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003480 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003490 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0034a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0034b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0034c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0034d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0034e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0034f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003500 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003510 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003520 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003530 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003540 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003550 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003560 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003570 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003580 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003590 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0035a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0035b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0035c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0035d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0035e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0035f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003600 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003610 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003620 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003630 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003640 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003650 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003660 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003670 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003680 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003690 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0036a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0036b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0036c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0036d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0036e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0036f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003700 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003710 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003720 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003730 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003740 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003750 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003760 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003770 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003780 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003790 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0037a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0037b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0037c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0037d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0037e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0037f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003800 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003810 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003820 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003830 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003840 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003850 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003860 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003870 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003880 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003890 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0038a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0038b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0038c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0038d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0038e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0038f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003900 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003910 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003920 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003930 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003940 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003950 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003960 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003970 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003980 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003990 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0039a0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0039b0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0039c0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0039d0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0039e0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        0039f0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a00 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a10 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a20 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a30 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a40 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a50 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a60 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a70 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a80 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003a90 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003aa0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ab0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ac0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ad0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ae0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003af0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b00 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b10 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b20 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b30 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b40 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b50 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b60 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b70 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b80 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003b90 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ba0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003bb0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003bc0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003bd0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003be0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003bf0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c00 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c10 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c20 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c30 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c40 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c50 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c60 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c70 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c80 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003c90 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ca0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003cb0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003cc0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003cd0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ce0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003cf0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d00 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d10 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d20 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d30 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d40 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d50 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d60 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d70 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d80 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003d90 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003da0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003db0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003dc0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003dd0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003de0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003df0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e00 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e10 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e20 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e30 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e40 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e50 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e60 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e70 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e80 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003e90 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ea0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003eb0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ec0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ed0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ee0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ef0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f00 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f10 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f20 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f30 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f40 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f50 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f60 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f70 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f80 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003f90 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003fa0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003fb0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003fc0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003fd0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003fe0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
        003ff0 ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff ff
    "#]]
    .assert_eq(&hex(&example(4096).0));
}

#[test]
fn golden_bytes_512() {
    let disk = example(512);
    expect![[r#"
        000000 44 43 50 47 23 07 f5 37 01 00 00 00 00 00 00 00
        000040 03 00 01 00 02 00 01 00 00 00 03 00 00 0c 00 00
        000050 00 00 00 00 03 00 03 00 03 00 03 00 03 00 03 00
        000060 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000070 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000080 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000090 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0000a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0000b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0000c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0000d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0000e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0000f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000100 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000110 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000120 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000130 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000140 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000150 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000160 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000170 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000180 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000190 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0001a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0001b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0001c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0001d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0001e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0001f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000200 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000210 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000220 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000230 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000240 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000250 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000260 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000270 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000280 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000290 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0002a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0002b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0002c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0002d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0002e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0002f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000300 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000310 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000320 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000330 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000340 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000350 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000360 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000370 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000380 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000390 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0003a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0003b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0003c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0003d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0003e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0003f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000400 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000410 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000420 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000430 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000440 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000450 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000460 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000470 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000480 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000490 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0004a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0004b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0004c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0004d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0004e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0004f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000500 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000510 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000520 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000530 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000540 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000550 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000560 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000570 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000580 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000590 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0005a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0005b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0005c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0005d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0005e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0005f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000600 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000610 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000620 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000630 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000640 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000650 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000660 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000670 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000680 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000690 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0006a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0006b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0006c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0006d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0006e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0006f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000700 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000710 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000720 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000730 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000740 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000750 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000760 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000770 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000780 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000790 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0007a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0007b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0007c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0007d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0007e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0007f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000800 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000810 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000820 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000830 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000840 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000850 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000860 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000870 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000880 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000890 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0008a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0008b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0008c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0008d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0008e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0008f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000900 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000910 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000920 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000930 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000940 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000950 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000960 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000970 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000980 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000990 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0009a0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0009b0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0009c0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0009d0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0009e0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        0009f0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a00 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a10 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a20 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a30 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a40 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a50 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a60 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a70 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a80 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000a90 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000aa0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ab0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ac0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ad0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ae0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000af0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b00 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b10 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b20 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b30 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b40 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b50 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b60 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b70 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b80 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000b90 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ba0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000bb0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000bc0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000bd0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000be0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000bf0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c00 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c10 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c20 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c30 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c40 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c50 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c60 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c70 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c80 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000c90 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ca0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000cb0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000cc0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000cd0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ce0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000cf0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d00 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d10 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d20 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d30 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d40 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d50 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d60 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d70 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d80 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000d90 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000da0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000db0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000dc0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000dd0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000de0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000df0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e00 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e10 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e20 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e30 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e40 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e50 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e60 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e70 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e80 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000e90 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ea0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000eb0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ec0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ed0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ee0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ef0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f00 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f10 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f20 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f30 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f40 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f50 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f60 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f70 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f80 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000f90 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000fa0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000fb0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000fc0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000fd0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000fe0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
        000ff0 03 00 03 00 03 00 03 00 03 00 03 00 03 00 03 00
    "#]]
    .assert_eq(&hex(&disk.0[12288..]));
}

#[test]
fn damage_is_told_and_never_guessed() {
    for sector_size in [512, 4096] {
        let identity = identity(sector_size);
        let good = example(sector_size);
        let (_, map, _) = good.open(&identity).unwrap();
        let (page, states) = (12288, (0..30).map(|block| map.entry(block)).collect::<Vec<_>>());
        for at in (0..good.0.len()).step_by(61) {
            let mut bad = File(good.0.clone());
            bad.0[at] ^= 0x40;
            match bad.open(&identity) {
                // One of two superblocks, or a slot that was never the newest.
                Ok((_, map, _)) if !(8192..8192 + 32).contains(&at) => {
                    let same = (0..30).map(|block| map.entry(block)).eq(states.iter().copied());
                    assert!(same || at >= page, "byte {at} changed what is believed");
                }
                Ok(_) => panic!("byte {at} of the live table was believed"),
                Err(error) => {
                    assert!(matches!(error, MapError::LiveTable | MapError::Page { .. }), "byte {at}: {error}")
                }
            }
        }
        let mut both = File(good.0.clone());
        both.0[100] ^= 1;
        both.0[4096 + 100] ^= 1;
        assert!(matches!(both.open(&identity), Err(MapError::Superblocks { .. })));
        let mut both = File(good.0.clone());
        both.0[page + 100] ^= 1;
        both.write(page as u64 + 4096, &[9; 4096]);
        assert!(matches!(both.open(&identity), Err(MapError::Page { page: 0 })));
        assert!(File(Vec::new()).open(&identity).is_err());
        let cut = File(good.0[..good.0.len() - 1].to_vec());
        assert!(matches!(cut.open(&identity), Err(MapError::Truncated { .. })));
    }
}

#[test]
fn a_foreign_map_is_refused_by_name() {
    let disk = example(4096);
    let other = Identity { volume: "billing".into(), ..identity(4096) };
    expect!["the clone map is for volume orders, not billing"].assert_eq(&disk.open(&other).err().unwrap().to_string());
    let other = Identity { shape: Shape::new(200 << 20, 4096).unwrap(), ..identity(4096) };
    expect!["the clone map is for size 104857600, not 209715200"]
        .assert_eq(&disk.open(&other).err().unwrap().to_string());
    let other = Identity { epoch: Some(8), ..identity(4096) };
    expect!["the clone map is for epoch 7, not 8"].assert_eq(&disk.open(&other).err().unwrap().to_string());
    let other = identity(512);
    expect!["the clone map is for sector size 4096, not 512"].assert_eq(&disk.open(&other).err().unwrap().to_string());
}

#[test]
fn an_unknown_flag_is_not_passed_over_for_the_older_superblock() {
    let mut disk = example(4096);
    // Slot B is the newest: give it a flag of tomorrow and a valid checksum.
    disk.0[4096 + 12] = 1;
    let crc = crc32c::crc32c(&disk.0[4096..8188]);
    disk.0[8188..8192].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(disk.open(&identity(4096)), Err(MapError::Superblocks { .. })));
}

/// A superblock or page with a valid checksum and any contents is refused or believed, without a panic.
#[test]
fn hostile_fields_under_valid_checksums_are_survived() {
    let good = example(512);
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for _ in 0..4000 {
        let mut bad = File(good.0.clone());
        let base = [0, 4096][(random() % 2) as usize];
        for _ in 0..1 + random() % 3 {
            let at = base
                + [12, 16, 24, 28, 96, 104, 108, 112, 120, 128, 132, 136][(random() % 12) as usize]
                + (random() % 4) as usize;
            bad.0[at] = [0, 1, 2, 7, 0x7F, 0xFF][(random() % 6) as usize];
        }
        let crc = crc32c::crc32c(&bad.0[base..base + 4092]);
        bad.0[base + 4092..base + 4096].copy_from_slice(&crc.to_le_bytes());
        let slot = 12288;
        bad.0[slot + 64 + (random() % 4032) as usize] = random() as u8;
        bad.0[slot + 4..slot + 8].fill(0);
        let crc = crc32c::crc32c(&bad.0[slot..slot + 4096]);
        bad.0[slot + 4..slot + 8].copy_from_slice(&crc.to_le_bytes());
        let _ = bad.open(&identity(512));
    }
}
