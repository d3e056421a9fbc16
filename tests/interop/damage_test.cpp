// Sound images, damaged field by field: our verdict is QEMU's, or there is a reason.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <set>

#include "base/bits.h"
#include "interop/damage_exceptions.h"
#include "interop/damaged_image.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t copied = std::uint64_t{1} << 63;
constexpr std::uint64_t compressed = std::uint64_t{1} << 62;

class DamageTest : public testing::Test {
protected:
    /// Makes an image, in directory_, that everybody agrees is sound.
    SoundImage make(const std::string& options, const std::string& size, const std::vector<std::string>& sessions,
                    const Arguments& create = {}) {
        Arguments arguments = {"create", "-q", "-f", "qcow2", "-o", options};
        arguments.insert(arguments.end(), create.begin(), create.end());
        arguments.insert(arguments.end(), {"sound.qcow2", size});
        must_qemu_img(arguments, directory_.path());
        for (const auto& session : sessions) {
            if (session.starts_with("io ")) {
                std::vector<std::string> commands;
                for (std::size_t at = 3; at < session.size();) {
                    const auto end = std::min(session.find(';', at), session.size());
                    commands.push_back(session.substr(at, end - at));
                    at = end + 1;
                }
                must_qemu_io("sound.qcow2", "qcow2", commands, directory_.path());
            } else {
                must_run({"sh", "-c", "qemu-img " + session}, directory_.path());
            }
        }
        SoundImage image(file_bytes(directory_.file("sound.qcow2")));
        expect_verdicts(image, {"sound", 0, 4, image.number(0, 4)});
        return image;
    }

    /// Clusters of 4 KiB; three L2 tables; data at guest clusters 0-9, of which 4 and 5 were zeroed in place; two
    /// compressed ones at 16 and 17 that share a host cluster; zeros without a place at 20; a snapshot; a bitmap.
    SoundImage usual(const std::string& options = "cluster_size=4096") {
        const bool version3 = options.find("compat=0.10") == std::string::npos;
        std::vector<std::string> sessions = {
            "io write -q -P 1 0 40k;write -q -c -P 2 64k 4k;write -q -c -P 3 68k 4k;write -q -P 4 5M 8k",
            "snapshot -q -c first sound.qcow2",
            "io write -q -P 5 0 16k;write -q -P 6 32k 8k;write -q -P 7 3M 4k",
        };
        if (version3) {
            sessions.insert(sessions.begin(), "bitmap --add -g 4096 sound.qcow2 dirty");
            sessions.push_back("io write -q -P 8 16k 8k;write -q -z 16k 8k;write -q -z 80k 4k");
        }
        return make(options, "6M", sessions);
    }

    /// Checks each damaged image with both, and holds every exception of `suite` against them.
    void expect_all(const SoundImage& image, const std::string& suite, const std::vector<Damage>& damages) {
        suite_ = suite;
        for (const auto& damage : damages) expect_verdicts(image, damage);
        expect_no_stale_exceptions();
    }

    void expect_no_stale_exceptions() {
        for (const auto& exception : exceptions) {
            if (exception.suite == suite_) {
                EXPECT_TRUE(used_.contains(&exception)) << "nothing needs the exception for " << exception.damage;
            }
        }
    }

    void expect_truncated(const SoundImage& image, std::uint64_t length) {
        suite_ = "truncated";
        expect_verdict_on(image.bytes().substr(0, length), fmt::format("{}", length));
    }

    [[nodiscard]] const std::filesystem::path& directory() const { return directory_.path(); }

private:
    void expect_verdicts(const SoundImage& image, const Damage& damage) {
        SCOPED_TRACE(fmt::format("at {:#x}: {:#x} becomes {:#x}", damage.at, image.number(damage.at, damage.width),
                                 damage.value));
        expect_verdict_on(image.with(damage), damage.name);
    }

    void expect_verdict_on(const std::string& bytes, const std::string& name) {
        SCOPED_TRACE(suite_ + ": " + name);
        const auto path = directory_.file("damaged.qcow2");
        put_file(path, bytes);
        const auto peer = qemu_img({"check", "-f", "qcow2", "damaged.qcow2"}, directory_.path());
        const auto ours = our_verdict(path);
        const auto theirs = peer_verdict(peer);
        const auto* exception = theirs == ours ? nullptr : exception_for(name, theirs, ours);
        if (exception != nullptr) {
            used_.insert(exception);
        } else {
            EXPECT_EQ(theirs, ours) << peer.text() << "ours:\n" << said_;
        }
        if (name == "sound") {
            EXPECT_EQ(ours, Verdict::clean);
        }
    }

    [[nodiscard]] const Exception* exception_for(std::string_view damage, Verdict peer, Verdict ours) const {
        const auto found = std::ranges::find_if(exceptions, [&](const Exception& exception) {
            const auto& pattern = exception.damage;
            const bool named =
                pattern.ends_with('*') ? damage.starts_with(pattern.substr(0, pattern.size() - 1)) : damage == pattern;
            return named && exception.suite == suite_ && exception.peer == peer && exception.ours == ours;
        });
        return found == exceptions.end() ? nullptr : &*found;
    }

    Verdict our_verdict(const std::string& path) {
        said_.clear();
        const auto image = try_open(path, Format::qcow2);
        if (!image) {
            expect_useful(image.error(), path);
            return Verdict::cannot_open;
        }
        use(**image, path);
        const auto report = (*image)->check({});
        if (!report) {
            expect_useful(report.error(), path);
            return Verdict::check_fails;
        }
        for (const auto& finding : report->findings) {
            said_ += finding.place + ": " + finding.what + "\n";
            expect_place(finding.place + ": " + finding.what);
        }
        EXPECT_EQ(report->findings.empty(), report->clean());
        return verdict_of(*report);
    }

    /// Whatever is in the image, using it ends, with contents or with an error that says where.
    void use(Image& image, const std::string& path) {
        if (const auto info = image.info(); !info) {
            expect_useful(info.error(), path);
        } else {
            for (const auto& snapshot : info->snapshots) {
                const auto disk = image.snapshots().open(snapshot.id);
                if (!disk) {
                    expect_useful(disk.error(), path);
                } else {
                    use_disk(**disk, path);
                }
            }
        }
        use_disk(image, path);
    }

    void use_disk(Disk& disk, const std::string& path) {
        const auto size = std::min<std::uint64_t>(disk.size(), 8 * MiB);
        const auto walked = each_extent(disk, {0}, size, [](const Extent&) -> Result<void> { return {}; });
        if (!walked) expect_useful(walked.error(), path);
        std::vector<std::byte> buffer(64 << 10);
        for (std::uint64_t at = 0; at < size; at += buffer.size()) {
            const auto part = std::span(buffer).first(std::min<std::uint64_t>(buffer.size(), size - at));
            if (const auto read = disk.read({at}, part); !read) expect_useful(read.error(), path);
        }
    }

    void expect_useful(const Error& error, const std::string& path) {
        said_ += error.message() + "\n";
        EXPECT_THAT(error.message(), testing::HasSubstr(std::filesystem::path(path).parent_path().string()))
            << "does not name the file";
        if (error.code == Errc::corrupt || error.code == Errc::limit_exceeded) expect_place(error.message());
    }

    /// A structure, and a number that tells which one or where it is.
    static void expect_place(const std::string& message) {
        static const std::regex place(
            "(header|field|extension|table|entry|cluster|directory|data of).*(0x[0-9a-f]+|byte [0-9]+|entry "
            "[0-9]+)|header: the file",
            std::regex::icase);
        EXPECT_TRUE(std::regex_search(message, place)) << "names no structure and place: " << message;
    }

    TemporaryDirectory directory_;
    std::string suite_ = "making";
    std::string said_;
    std::set<const Exception*> used_;
};

/// What a field of `width` bytes at `at` might wrongly hold: the extremes, its neighbours, each single bit flipped.
std::vector<Damage> every_way(const SoundImage& image, const std::string& name, std::uint64_t at, unsigned width,
                              const std::vector<std::uint64_t>& more = {}) {
    const auto now = image.number(at, width);
    const auto all = width == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * width)) - 1;
    std::set<std::uint64_t> values = {0, 1, all, all >> 1, now + 1, now - 1, now * 2};
    values.insert(more.begin(), more.end());
    for (unsigned bit = 0; bit < 8 * width; bit += width == 8 && bit >= 14 && bit < 54 ? 4 : 1)
        values.insert(now ^ std::uint64_t{1} << bit);
    std::vector<Damage> damages;
    for (const auto value : values) {
        if ((value & all) != now)
            damages.push_back({fmt::format("{}={:#x}", name, value & all), at, width, value & all});
    }
    return damages;
}

/// Wrong values for a host offset.
std::vector<std::uint64_t> wrong_offsets(const SoundImage& image) {
    const auto cluster = image.cluster_size();
    const auto end = (image.size() + cluster - 1) / cluster * cluster;
    return {cluster,
            end - cluster,
            end,
            end + cluster,
            end + 512,
            image.l1(),
            image.l2(0),
            image.refcount_table(),
            image.first_refcount_block(),
            (std::uint64_t{1} << 56) - cluster,
            std::uint64_t{1} << 56,
            (std::uint64_t{1} << 63) - cluster};
}

/// The same for an entry of an L1 or L2 table, with names that tell the kind.
std::vector<Damage> wrong_entries(const SoundImage& image, const std::string& name, std::uint64_t at) {
    const auto now = image.number(at);
    const auto flags = now & (copied | compressed | 1);
    const auto cluster = image.cluster_size();
    const auto end = (image.size() + cluster - 1) / cluster * cluster;
    std::vector<Damage> damages;
    const auto add = [&](const std::string& what, std::uint64_t value) {
        if (value != now) damages.push_back({name + "." + what, at, 8, value});
    };
    add("zero", 0);
    add("all_ones", ~std::uint64_t{0});
    add("copied_flipped", now ^ copied);
    add("compressed_flipped", now ^ compressed);
    add("only_copied", copied);
    add("misaligned_512", now + 512);
    add("misaligned_half", now + cluster / 2);
    for (unsigned bit = 0; bit < 9; ++bit) add(fmt::format("low_bit_{}", bit), now ^ std::uint64_t{1} << bit);
    for (unsigned bit = 56; bit < 62; ++bit) add(fmt::format("high_bit_{}", bit), now ^ std::uint64_t{1} << bit);
    add("at_end", flags | end);
    add("past_end", flags | (end + cluster));
    add("last_cluster", flags | (end - cluster));
    add("far", flags | ((std::uint64_t{1} << 56) - cluster));
    add("into_refcount_table", flags | image.refcount_table());
    add("into_refcount_block", flags | image.first_refcount_block());
    add("into_l1", flags | image.l1());
    add("into_l2", flags | image.l2(0));
    add("next_cluster", now + cluster);
    return damages;
}

void append(std::vector<Damage>& to, const std::vector<Damage>& more) { to.insert(to.end(), more.begin(), more.end()); }

TEST_F(DamageTest, Header) {
    const auto image = usual();
    std::vector<Damage> damages;
    append(damages, every_way(image, "magic", 0, 4));
    append(damages, every_way(image, "version", 4, 4, {2, 4}));
    append(damages, every_way(image, "backing_offset", 8, 8, wrong_offsets(image)));
    append(damages, every_way(image, "backing_size", 16, 4));
    append(damages, every_way(image, "cluster_bits", 20, 4, {8, 9, 21, 22}));
    append(damages, every_way(image, "size", 24, 8, {2 * MiB, 6 * MiB - 512, 6 * MiB + 512}));
    append(damages, every_way(image, "crypt_method", 32, 4));
    append(damages, every_way(image, "l1_size", 36, 4, {4, 512, 513, 1U << 22, (1U << 22) + 1}));
    append(damages, every_way(image, "l1_offset", 40, 8, wrong_offsets(image)));
    append(damages, every_way(image, "refcount_offset", 48, 8, wrong_offsets(image)));
    append(damages, every_way(image, "refcount_clusters", 56, 4, {2, 2048, 2049}));
    append(damages, every_way(image, "snapshot_count", 60, 4, {2, 65536, 65537}));
    append(damages, every_way(image, "snapshot_offset", 64, 8, wrong_offsets(image)));
    expect_all(image, "header", damages);
}

TEST_F(DamageTest, HeaderOfVersion3) {
    const auto image = usual();
    std::vector<Damage> damages;
    append(damages, every_way(image, "incompatible", 72, 8));
    append(damages, every_way(image, "compatible", 80, 8));
    append(damages, every_way(image, "autoclear", 88, 8));
    append(damages, every_way(image, "refcount_order", 96, 4, {5, 6, 7}));
    append(damages, every_way(image, "header_length", 100, 4, {72, 104, 105, 120, 4096, 4104}));
    append(damages, every_way(image, "compression_type", 104, 1, {1, 2}));
    append(damages, every_way(image, "extension_type", image.number(100, 4), 4, {0xe2792aca, 0x23852875, 0x0537be77}));
    append(damages, every_way(image, "extension_length", image.number(100, 4) + 4, 4));
    expect_all(image, "header 3", damages);
}

TEST_F(DamageTest, HeaderOfVersion2) {
    const auto image = usual("compat=0.10,cluster_size=4096");
    std::vector<Damage> damages;
    append(damages, every_way(image, "version", 4, 4));
    append(damages, every_way(image, "cluster_bits", 20, 4));
    append(damages, every_way(image, "l1_size", 36, 4));
    append(damages, every_way(image, "extension_type", 72, 4, {0xe2792aca}));
    append(damages, wrong_entries(image, "data", image.l2_entry(1)));
    append(damages, wrong_entries(image, "compressed", image.l2_entry(16)));
    expect_all(image, "header 2", damages);
}

TEST_F(DamageTest, HeaderWithBackingFile) {
    must_qemu_img({"create", "-q", "-f", "qcow2", "base.qcow2", "2M"}, directory());
    const auto image = make("cluster_size=4096", "4M", {"io write -q -P 1 0 8k"}, {"-b", "base.qcow2", "-F", "qcow2"});
    std::vector<Damage> damages;
    append(damages, every_way(image, "backing_offset", 8, 8));
    append(damages, every_way(image, "backing_size", 16, 4, {1023, 1024}));
    append(damages, every_way(image, "format_length", image.number(100, 4) + 4, 4));
    append(damages, every_way(image, "format", image.number(100, 4) + 8, 1));
    append(damages, every_way(image, "name", image.number(8), 1));
    expect_all(image, "backing", damages);
}

TEST_F(DamageTest, L1Entries) {
    const auto image = usual();
    std::vector<Damage> damages;
    append(damages, wrong_entries(image, "first", image.l1()));
    append(damages, wrong_entries(image, "last", image.l1() + 16));
    append(damages, {{"two_share", image.l1() + 8, 8, image.number(image.l1())},
                     {"two_share_without_copied", image.l1() + 8, 8, image.number(image.l1()) & ~copied}});
    expect_all(image, "L1", damages);
}

TEST_F(DamageTest, L2Entries) {
    const auto image = usual();
    std::vector<Damage> damages;
    append(damages, wrong_entries(image, "own", image.l2_entry(0)));        // refcount 1
    append(damages, wrong_entries(image, "shared", image.l2_entry(6)));     // with the snapshot
    append(damages, wrong_entries(image, "zero_kept", image.l2_entry(4)));  // reads as zeros, keeps a cluster
    append(damages, wrong_entries(image, "zero", image.l2_entry(20)));
    append(damages, wrong_entries(image, "compressed", image.l2_entry(16)));
    append(damages, wrong_entries(image, "unallocated", image.l2_entry(100)));
    append(damages, {{"two_share", image.l2_entry(1), 8, image.number(image.l2_entry(0))},
                     {"two_share_without_copied", image.l2_entry(1), 8, image.number(image.l2_entry(0)) & ~copied}});
    expect_all(image, "L2", damages);
}

TEST_F(DamageTest, Refcounts) {
    const auto image = usual();
    const std::vector<std::pair<std::string, std::uint64_t>> clusters = {
        {"header", 0},
        {"refcount_table", image.refcount_table()},
        {"refcount_block", image.first_refcount_block()},
        {"l1", image.l1()},
        {"l2", image.l2(0)},
        {"own_data", image.number(image.l2_entry(0)) & SoundImage::offset_mask},
        {"shared_data", image.number(image.l2_entry(6)) & SoundImage::offset_mask},
        {"zero_kept", image.number(image.l2_entry(4)) & SoundImage::offset_mask},
        {"compressed", image.number(image.l2_entry(16)) & (SoundImage::offset_mask >> 4)},
        {"snapshot_table", image.snapshots()},
        {"snapshot_l1", image.number(image.snapshots())},
        {"bitmap_directory", image.bitmap_directory()},
        {"bitmap_table", image.number(image.bitmap_directory())},
        {"unused", image.size() + 3 * image.cluster_size()},
    };
    std::vector<Damage> damages;
    for (const auto& [name, offset] : clusters) {
        const auto at = image.refcount(offset);
        const auto now = image.number(at, 2);
        for (const auto& [what, value] : std::vector<std::pair<std::string, std::uint64_t>>{
                 {"zero", 0}, {"one", 1}, {"less", now - 1}, {"more", now + 1}, {"most", 0xffff}}) {
            if (value != now && value != 0xffff'ffff'ffff'ffff) damages.push_back({name + "." + what, at, 2, value});
        }
    }
    expect_all(image, "refcounts", damages);
}

TEST_F(DamageTest, RefcountTable) {
    const auto image = usual();
    const auto at = image.refcount_table();
    std::vector<Damage> damages;
    append(damages, wrong_entries(image, "first", at));
    append(damages, {{"second.at_block", at + 8, 8, image.first_refcount_block()},
                     {"second.at_end", at + 8, 8, image.size() / 4096 * 4096 + 8192},
                     {"second.misaligned", at + 8, 8, 512},
                     {"second.low_bit", at + 8, 8, 1},
                     {"second.into_l1", at + 8, 8, image.l1()},
                     {"last.at_end", at + 4096 - 8, 8, image.size() / 4096 * 4096 + 4096},
                     {"last.far", at + 4096 - 8, 8, (std::uint64_t{1} << 63) - 4096}});
    expect_all(image, "refcount table", damages);
}

TEST_F(DamageTest, SnapshotTable) {
    const auto image = usual();
    const auto at = image.snapshots();
    std::vector<Damage> damages;
    append(damages, every_way(image, "l1_offset", at, 8, wrong_offsets(image)));
    append(damages, every_way(image, "l1_size", at + 8, 4));
    append(damages, every_way(image, "id_length", at + 12, 2));
    append(damages, every_way(image, "name_length", at + 14, 2));
    append(damages, every_way(image, "vm_state", at + 32, 4));
    append(damages, every_way(image, "extra_length", at + 36, 4, {8, 16, 24, 1024, 1025, 2048}));
    append(damages, every_way(image, "vm_state_64", at + 40, 8));
    append(damages, every_way(image, "disk_size", at + 48, 8));
    append(damages, wrong_entries(image, "l1", image.number(at)));
    expect_all(image, "snapshots", damages);
}

TEST_F(DamageTest, Bitmaps) {
    const auto image = usual();
    const auto extension = image.extension(0x23852875);
    const auto directory = image.bitmap_directory();
    const auto table = image.number(directory);
    std::vector<Damage> damages;
    append(damages, every_way(image, "count", extension, 4));
    append(damages, every_way(image, "reserved", extension + 4, 4));
    append(damages, every_way(image, "directory_size", extension + 8, 8));
    append(damages, every_way(image, "directory_offset", extension + 16, 8, wrong_offsets(image)));
    append(damages, every_way(image, "table_offset", directory, 8, wrong_offsets(image)));
    append(damages, every_way(image, "table_size", directory + 8, 4));
    append(damages, every_way(image, "flags", directory + 12, 4));
    append(damages, every_way(image, "type", directory + 16, 1));
    append(damages, every_way(image, "granularity_bits", directory + 17, 1));
    append(damages, every_way(image, "name_length", directory + 18, 2));
    append(damages, every_way(image, "extra_length", directory + 20, 4));
    append(damages, wrong_entries(image, "table", table));
    expect_all(image, "bitmaps", damages);
}

TEST_F(DamageTest, ExtendedL2Entries) {
    const auto image = make("cluster_size=16384,extended_l2=on", "4M",
                            {"io write -q -P 1 0 20k;write -q -z 1k 2k;write -q -z 64k 16k;write -q -c -P 3 128k "
                             "16k;write -q -P 1 200k 1k"});
    std::vector<Damage> damages;
    for (const auto& [name, cluster] : std::vector<std::pair<std::string, std::uint64_t>>{
             {"data", 0}, {"partial", 1}, {"zero", 4}, {"compressed", 8}, {"unallocated", 30}}) {
        const auto at = image.l2_entry(cluster, 16);
        append(damages, wrong_entries(image, name, at));
        append(damages, every_way(image, name + ".bitmap", at + 8, 8, {0xffff'ffff, 0xffff'ffff'0000'0000}));
    }
    expect_all(image, "extended L2", damages);
}

TEST_F(DamageTest, ImageWithDataFile) {
    const auto image =
        make("cluster_size=4096,data_file=sound.data", "4M", {"io write -q -P 1 0 16k;write -q -z 8k 4k"});
    std::vector<Damage> damages;
    append(damages, wrong_entries(image, "first", image.l2_entry(0)));
    append(damages, wrong_entries(image, "second", image.l2_entry(1)));
    append(damages, wrong_entries(image, "zero_kept", image.l2_entry(2)));
    append(damages, every_way(image, "incompatible", 72, 8));
    append(damages, every_way(image, "snapshot_count", 60, 4));
    append(damages, every_way(image, "name_length", image.number(100, 4) + 4, 4));
    expect_all(image, "data file", damages);
}

/// Cut off after so many bytes.
TEST_F(DamageTest, Truncated) {
    const auto image = usual();
    const auto cluster = image.cluster_size();
    for (const std::uint64_t length : {std::uint64_t{0}, std::uint64_t{3}, std::uint64_t{71}, std::uint64_t{103},
                                       std::uint64_t{111}, std::uint64_t{512}, cluster, 2 * cluster, 3 * cluster,
                                       5 * cluster, image.size() / 2, image.size() - cluster, image.size() - 1}) {
        expect_truncated(image, length);
    }
    expect_no_stale_exceptions();
}

}  // namespace
}  // namespace qcow::test
