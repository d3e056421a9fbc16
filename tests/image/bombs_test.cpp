// Small files that stand for very much, each given to the commands that people give images to: what these take of time
// and memory, measured from outside, and what they say.

#include <fmt/format.h>
#include <zlib.h>

#include "hostile.h"
#include "support/measured.h"

namespace qcow::hostile {
namespace {

/// What is expected of one command.
struct Expected {
    std::vector<std::string> arguments;  // behind the name of the tool; "IMAGE" is the image
    int status = 0;
    std::string says = {};         // a part of what it prints
    double seconds = 1;            // of a processor, at most
    std::uint64_t mebibytes = 64;  // resident, at most: what the command takes for any image, and a little more
};

struct Bomb {
    std::string name;
    std::function<void(const class BombFiles&)> write;  // makes "image"
    std::vector<Expected> expected;

    friend void PrintTo(const Bomb& bomb, std::ostream* out) { *out << bomb.name; }
};

class BombFiles : public Hostile {
public:
    using Hostile::path;
    using Hostile::write;
    void write_image(HostileImage& image, std::uint64_t clusters = 4) const { write("image", image.finish(clusters)); }
};

const std::vector<std::string> info = {"info", "IMAGE"};
const std::vector<std::string> check = {"check", "IMAGE"};
const std::vector<std::string> convert = {"convert", "IMAGE", "copy"};

/// Bytes that a command prints, at most: what its lines take, and not more because some are long.
constexpr std::size_t max_output = 16 * MiB;

constexpr int failed = 1;
constexpr int corrupt = 2;

void longest_l1(const BombFiles& files) {
    HostileImage image;
    image.l1_entries = 0xffff'ffff;
    files.write_image(image);
}

/// 16384 tables of 64 entries: 8 MiB that map 512 MiB.
void a_million_entries_for_one_cluster(const BombFiles& files) {
    HostileImage image(9);
    constexpr std::uint64_t tables = 16384;
    image.size = tables * 64 * 512;
    image.l1_entries = tables;
    image.l1_table = 8;
    for (std::uint64_t i = 0; i < tables; ++i)
        image.file.write_word(image.cluster(8) + i * 8, image.cluster(1000 + i) | format::copied_bit);
    image.fill(image.cluster(1000), tables * 64, image.cluster(900) | format::copied_bit);
    image.refcount_table = 2;
    image.refcount_table_clusters = 2;
    for (std::uint64_t i = 0; i < 68; ++i) image.file.write_word(image.cluster(2) + i * 8, image.cluster(500 + i));
    image.fill(image.cluster(500), 68 * 64, 0x0001'0001'0001'0001);
    files.write_image(image, 1000 + tables);
}

/// The table is full of entries that lead to its own first cluster, as a block.
void refcount_blocks_that_are_their_table(const BombFiles& files) {
    HostileImage image;
    image.refcount_table = 8;
    image.refcount_table_clusters = 128;
    image.fill(image.cluster(8), bit(20), image.cluster(8));
    files.write_image(image, 200);
}

Bytes snapshot_head(std::uint32_t extra) {
    Bytes entry;
    append(entry, 0, 8);  // the L1 table
    append(entry, 0, 4);
    append(entry, 1, 2);
    append(entry, 1, 2);
    entry.resize(36);
    append(entry, extra, 4);
    return entry;
}

void snapshots_without_end(const BombFiles& files) {
    HostileImage image;
    image.snapshots = 65536;
    image.snapshot_table = 4;
    image.file.write(image.cluster(4), snapshot_head(0xffff'ffff));
    image.file.fixed_size = bit(40);
    files.write_image(image);
}

/// A terabyte of hole: in version 2 each 40 zeros are a snapshot.
void snapshots_in_a_hole(const BombFiles& files) {
    HostileImage image;
    image.version = 2;
    image.snapshots = 65536;
    image.snapshot_table = 16;
    image.file.fixed_size = bit(40);
    files.write_image(image);
}

/// An image that holds nothing but the name of the one below, and is sound otherwise.
void write_layer(const BombFiles& files, const std::string& name, const std::string& below) {
    HostileImage image(9);
    image.size = 4096;
    image.write_refcounts(4);
    image.backing_name = below;
    if (!below.empty()) image.set_backing_format("qcow2");
    files.write(name, image.finish());
}

/// "one/two" is "one", and "link" in it is the image.
void loop_through_links(const BombFiles& files) {
    write_layer(files, "image", "one/two/link");
    std::filesystem::create_directory(files.path("one"));
    std::filesystem::create_directory_symlink("../one", files.path("one/two"));
    std::filesystem::create_symlink("../image", files.path("one/link"));
}

void chain_of(const BombFiles& files, int count) {
    for (int i = 1; i <= count; ++i) {
        const auto name = i == count ? "image" : "layer" + std::to_string(i);
        write_layer(files, name, i == 1 ? "" : "layer" + std::to_string(i - 1));
    }
}

/// Each cluster of the disk is the same compressed stream.
void compressed(const BombFiles& files, unsigned cluster_bits, bool zstd, Bytes stream, std::uint64_t clusters) {
    HostileImage image(cluster_bits);
    image.zstd = zstd;
    image.size = image.cluster(clusters);
    image.write_refcounts(8);
    image.file.write_word(image.cluster(3), image.cluster(4) | format::copied_bit);
    const std::uint64_t sectors = std::min<std::uint64_t>((stream.size() + 511) / 512, bit(cluster_bits - 8));
    const std::uint64_t entry = format::compressed_bit | (sectors - 1) << (62 - (cluster_bits - 8)) | image.cluster(5);
    image.fill(image.cluster(4), clusters, entry);
    image.file.segments.push_back({image.cluster(5), std::move(stream)});
    files.write_image(image, 8);
}

/// A frame that says it has 2^32 + 5 bytes, and goes on and on.
void zstd_frame_of_4_gib(const BombFiles& files) {
    Bytes stream;
    append(stream, 0x28b52ffd, 4);
    append(stream, 0xe0, 1);
    for (unsigned i = 0; i < 8; ++i) append(stream, std::uint64_t{0x1'0000'0005} >> (8 * i) & 0xff, 1);
    for (unsigned i = 0; i < 15'000; ++i) {
        const std::uint32_t block = 128 * 1024 << 3 | 1 << 1;  // 128 KiB of one byte, and not the last
        for (unsigned b = 0; b < 3; ++b) append(stream, block >> (8 * b) & 0xff, 1);
        append(stream, 'z', 1);
    }
    compressed(files, 16, true, std::move(stream), 64);
}

/// Four MiB, as much as an entry can say, that inflate to four GiB of zeros; and 256 entries for them.
void deflate_of_4_gib(const BombFiles& files) {
    z_stream zlib = {};
    ASSERT_EQ(deflateInit2(&zlib, 9, Z_DEFLATED, -15, 9, Z_DEFAULT_STRATEGY), Z_OK);
    Bytes plain(MiB);
    Bytes piece(64 * KiB);
    zlib.next_in = reinterpret_cast<Bytef*>(plain.data());
    zlib.avail_in = static_cast<uInt>(plain.size());
    zlib.next_out = reinterpret_cast<Bytef*>(piece.data());
    zlib.avail_out = static_cast<uInt>(piece.size());
    // After a full flush the stream goes on as if it had just begun, so that pieces can be put one behind the other.
    ASSERT_EQ(deflate(&zlib, Z_FULL_FLUSH), Z_OK);
    piece.resize(zlib.total_out);
    deflateEnd(&zlib);
    Bytes stream;
    while (stream.size() + piece.size() < 4 * MiB) stream.insert(stream.end(), piece.begin(), piece.end());
    compressed(files, 21, false, std::move(stream), 256);
}

void l2_table_in_the_header(const BombFiles& files) {
    HostileImage image;
    image.write_refcounts(4);
    image.file.write_word(image.cluster(3), 0x200 | format::copied_bit);
    files.write_image(image);
}

/// One with the longest name that there is, and thousands without one.
void one_long_name(const BombFiles& files) {
    HostileImage image;
    image.version = 2;  // whose entries need no more than a head
    image.snapshots = 20'000;
    image.snapshot_table = 4;
    Bytes table = snapshot_head(0);
    store_be<std::uint16_t>(table, 14, 0xffff);
    append(table, "1" + std::string(0xffff, 'n'));
    const auto other = snapshot_head(0);
    for (std::uint32_t i = 1; i < image.snapshots; ++i) {
        table.resize((table.size() + 7) / 8 * 8);
        table.insert(table.end(), other.begin(), other.end());
        append(table, "1n");
    }
    image.file.write(image.cluster(4), table);
    files.write_image(image, 64);
}

void bitmaps(const BombFiles& files, std::uint32_t count) {
    HostileImage image(9);
    image.size = 4096;
    image.autoclear = 1;
    const std::uint64_t table = bit(24);
    image.fill(table, 4096, 1);
    Bytes directory;
    for (std::uint32_t i = 0; i < count; ++i) {
        append(directory, table, 8);
        append(directory, 0x0010'0000, 4);  // entries
        append(directory, 0, 4);
        append(directory, 0x0110, 2);  // a dirty bitmap of 64 KiB
        append(directory, 5, 2);       // the name
        append(directory, 0, 4);
        append(directory, std::to_string(10'000 + i).substr(0, 5));
        append(directory, 0, 3);
    }
    Bytes extension;
    append(extension, count, 4);
    append(extension, 0, 4);
    append(extension, directory.size(), 8);
    append(extension, bit(25), 8);
    image.extensions.push_back({0x2385'2875, std::move(extension)});
    image.file.segments.push_back({bit(25), std::move(directory)});
    image.file.fixed_size = bit(40);
    files.write_image(image);
}

std::vector<Bomb> all_bombs() {
    const std::vector<std::string> snapshots = {"snapshot", "--list", "IMAGE"};
    const auto all = [](int status, const std::string& says) {
        return std::vector<Expected>{{info, status, says}, {check, status, says}, {convert, status, says}};
    };
    return {
        {"LongestL1Table", longest_l1, all(failed, "l1_size (byte 36)")},
        {"AMillionEntriesForOneCluster",
         a_million_entries_for_one_cluster,
         {{info},
          {check, corrupt, "host cluster at 0x70800: refcount 1 is less than its 1048576 references (data)"},
          {convert, 0, "", 4}}},
        {"RefcountBlocksThatAreTheirTable",
         refcount_blocks_that_are_their_table,
         {{info},
          {check, corrupt, "refcount table entry 0: overlap: the block at host offset 0x80000 is in use"},
          {convert}}},
        {"SnapshotsWithoutEnd",
         snapshots_without_end,
         {{info, 0, "snapshot table entry 0 (host offset 0x40000): an entry of 4294967337 bytes"},
          {snapshots, failed, "snapshot table entry 0 (host offset 0x40000)"},
          {check, corrupt, "snapshot table entry 0 (host offset 0x40000)"},
          {convert}}},
        {"SnapshotsInAHole",
         snapshots_in_a_hole,
         {{info, 0, "", 4},
          {snapshots, 0, "", 4},
          {check, corrupt, "L1 table of snapshot \"\" at host offset 0x0: 0 entries, but a virtual size of 1048576"},
          {convert}}},
        {"OneLongName",
         one_long_name,
         {{info, 0, "nnnn"},
          {snapshots, 0, "nnnn"},
          {check, corrupt, "L1 table of snapshot \"n\" at host offset 0x0: 0 entries"},
          {convert}}},
        {"LoopThroughLinks",
         loop_through_links,
         {{info}, {check, failed, "one/two/link: the backing chain is a loop"}, {convert, failed, "loop"}}},
        {"ChainOf4096",
         [](const BombFiles& files) { chain_of(files, 4096); },
         {{info, 0, "", 4, 192}, {check, 0, "", 4, 192}, {convert, 0, "", 4, 192}}},
        {"ChainOf4097",
         [](const BombFiles& files) { chain_of(files, 4097); },
         {{info, 0, "", 4, 192}, {convert, failed, "layer1: the backing chain is longer than 4096 files", 4, 192}}},
        {"ZstdFrameOf4GiB",
         zstd_frame_of_4_gib,
         {{info},
          {check, corrupt, "host cluster at 0x50000: refcount 1 is less than its 64 references (compressed data)"},
          {convert, failed, "host offset 0x50000"}}},
        {"DeflateOf4GiB",
         deflate_of_4_gib,
         {{info},
          {check, corrupt, "host cluster at 0xa00000: refcount 1 is less than its 256 references (compressed data)"},
          {convert, 0, "", 5}}},
        {"L2TableInTheHeader",
         l2_table_in_the_header,
         {{info},
          {check, corrupt, "entry 0: the L2 table's offset 0x200 is not a multiple of the cluster size"},
          {convert, failed, "0x200"}}},
        {"MostBitmaps",
         [](const BombFiles& files) { bitmaps(files, 65535); },
         {{info, 0, "", 4},
          {check, corrupt, "bitmap \"10000\" (table at host offset 0x1000000): its table has 1048576 entries", 4},
          {convert}}},
        {"OneBitmapTooMany",
         [](const BombFiles& files) { bitmaps(files, 65536); },
         {{info, 0, "bitmap directory at host offset 0x2000000: 65536 bitmaps: there may be 1 to 65535"},
          {check, corrupt, "bitmap directory at host offset 0x2000000: 65536 bitmaps"},
          {convert}}},
    };
}

class Bombs : public BombFiles, public testing::WithParamInterface<Bomb> {};

TEST_P(Bombs, AreHandledWithinBounds) {
    GetParam().write(*this);
    for (const auto& expected : GetParam().expected) {
        std::vector<std::string> argv = {QCOW_TOOL};
        for (const auto& word : expected.arguments) argv.push_back(word == "IMAGE" ? "image" : word);
        const auto measured = test::run_measured(argv, dir_);
        const auto said = measured.finished.out + measured.finished.err;
        SCOPED_TRACE(fmt::format("{}\n{:.2000}\nexit status {}, {:.2f} s, {} MiB", fmt::join(expected.arguments, " "),
                                 said, measured.finished.status, measured.processor_seconds,
                                 measured.peak_bytes / MiB));
        EXPECT_EQ(measured.finished.status, expected.status);
        EXPECT_LT(said.size(), max_output);
        EXPECT_TRUE(said.find(expected.says) != std::string::npos) << "not said: " << expected.says;
        EXPECT_LT(measured.processor_seconds, expected.seconds * slowness);
        // Sanitizers keep what was freed, and shadows of everything.
        EXPECT_LT(measured.peak_bytes, expected.mebibytes * MiB * fatness);
    }
}

INSTANTIATE_TEST_SUITE_P(All, Bombs, testing::ValuesIn(all_bombs()),
                         [](const auto& instance) { return instance.param.name; });

}  // namespace
}  // namespace qcow::hostile
