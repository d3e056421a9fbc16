// Every kind of image that QEMU makes, read, mapped and verified by us and by QEMU.

#include <gtest/gtest.h>

#include <iostream>
#include <set>

#include "interop/matrix_cases.h"
#include "support/disks.h"

namespace qcow::test {
namespace {

using Kind = Extent::Kind;

/// A run of QEMU's map.
struct PeerExtent {
    std::uint64_t start;
    std::uint64_t end;
    bool data;
    bool zero;
    bool present;
    unsigned depth;
    std::optional<std::uint64_t> offset;
};

std::vector<PeerExtent> peer_map(const std::string& path, const std::string& format,
                                 const std::filesystem::path& directory) {
    std::vector<PeerExtent> result;
    for (const auto& e : qemu_img_json({"map", "--output=json", "-f", format, path}, directory)) {
        const std::uint64_t start = e["start"];
        result.push_back({start, start + e["length"].get<std::uint64_t>(), e["data"], e["zero"], e["present"],
                          e["depth"], e.contains("offset") ? std::optional<std::uint64_t>(e["offset"]) : std::nullopt});
    }
    return result;
}

std::vector<Extent> our_map(Disk& disk) {
    std::vector<Extent> result;
    value_of(each_extent(disk, {0}, disk.size(), [&](const Extent& extent) -> Result<void> {
        result.push_back(extent);
        return {};
    }));
    return result;
}

std::string text(const PeerExtent& e) {
    return fmt::format("QEMU: [{}, {}) data {} zero {} present {} depth {} offset {}", e.start, e.end, e.data, e.zero,
                       e.present, e.depth, e.offset ? fmt::format("{}", *e.offset) : "none");
}

std::string text(const Extent& e) {
    return fmt::format("ours: [{}, {}) kind {} compressed {} depth {} offset {}", e.start.value,
                       e.start.value + e.length, static_cast<int>(e.kind), e.compressed, e.depth,
                       e.host ? fmt::format("{}", e.host->value) : "none");
}

/// Compares where two extents overlap, from `at` on.
void expect_alike(const PeerExtent& peer, const Extent& ours, std::uint64_t at) {
    const auto both = fmt::format("at {}:\n{}\n{}", at, text(peer), text(ours));
    ASSERT_EQ(peer.data, ours.kind == Kind::data) << both;
    if (!peer.data) {
        ASSERT_TRUE(peer.zero) << both;
        return;
    }
    ASSERT_EQ(peer.depth, ours.depth) << both;
    ASSERT_EQ(peer.offset.has_value(), ours.host.has_value()) << both;
    ASSERT_TRUE(!ours.compressed || !ours.host) << both;
    if (peer.offset) {
        ASSERT_EQ(*peer.offset + (at - peer.start), ours.host->value + (at - ours.start.value)) << both;
    }
}

/// QEMU counts in sectors: two maps agree if they do at the start of each.
void expect_maps_agree(const std::vector<PeerExtent>& peer, const std::vector<Extent>& ours, std::uint64_t size) {
    constexpr std::uint64_t sector = 512;
    std::size_t p = 0;
    std::size_t o = 0;
    for (std::uint64_t at = 0; at < size;) {
        while (p < peer.size() && peer[p].end <= at) ++p;
        while (o < ours.size() && ours[o].start.value + ours[o].length <= at) ++o;
        ASSERT_LT(p, peer.size()) << "QEMU's map ends before " << at;
        ASSERT_LT(o, ours.size()) << "our map ends before " << at;
        ASSERT_LE(ours[o].start.value, at) << "a gap in our map";
        ASSERT_NO_FATAL_FAILURE(expect_alike(peer[p], ours[o], at));
        const auto next = std::min(peer[p].end, ours[o].start.value + ours[o].length);
        at = (next + sector - 1) / sector * sector;
    }
    std::uint64_t covered = 0;
    for (const auto& extent : ours) covered += extent.length;
    ASSERT_EQ(covered, size) << "the lengths of our extents do not add up";
}

/// Copies and reads of the disk give what the reference holds.
void expect_contents(Disk& disk, const ReferenceFile& reference, const TemporaryDirectory& directory, Random& random) {
    ASSERT_EQ(disk.size(), reference.size());
    if (disk.size() <= (std::uint64_t{8} << 20) && random.chance(50)) {
        auto memory = memory_storage();
        value_of(memory->resize(disk.size()));
        auto raw = value_of(open_image(memory, {.writable = true, .format = Format::raw}));
        CopyOptions options;
        options.workers = static_cast<unsigned>(random.between(1, 4));
        options.sparse_bytes = random.pick({0, 512, 65536});
        value_of(copy_disk(disk, *raw, options));
        std::string copy(disk.size(), '\0');
        value_of(raw->read({0}, std::as_writable_bytes(std::span(copy))));
        std::string expected(disk.size(), '\0');
        reference.read(0, std::as_writable_bytes(std::span(expected)));
        const auto differ = std::ranges::mismatch(copy, expected);
        ASSERT_TRUE(differ.in1 == copy.end()) << "the copy differs first at " << differ.in1 - copy.begin();
    } else {
        const auto target = directory.file("copy.raw");
        copy_to_file(disk, target);
        const auto differ = first_difference(ReferenceFile(target), reference);
        ASSERT_FALSE(differ) << "the copy differs first at " << *differ;
    }
    ASSERT_NO_FATAL_FAILURE(expect_random_reads(disk, reference, random, 120));
}

class Matrix : public testing::TestWithParam<ImageSpec> {
protected:
    void compare_checks(const ImageMaker& maker, std::size_t layer) {
        const auto path = maker.file(layer);
        const auto peer = qemu_img({"check", "--output=json", "-f", maker.spec().layers[layer].format, path},
                                   maker.directory().path());
        const auto image = open_alone(path);
        const auto report = value_of(image->check({}));
        const auto& spec = maker.spec().layers[layer];
        const unsigned uncounted =
            spec.data_file != DataFile::none && !spec.extended_l2 && keeps_offset_0(path) ? 1 : 0;
        std::string findings;
        for (const auto& f : report.findings) findings += f.place + ": " + f.what + "\n";
        SCOPED_TRACE(peer.text() + "\nours:\n" + findings);

        // QEMU does not tell what opening for writing mends from what is damaged.
        const auto damaged = report.corruptions + report.errors + report.postponed;
        const int expected = damaged > 0 ? 2 : report.leaks > 0 ? 3 : 0;
        ASSERT_EQ(peer.status, expected);
        ASSERT_TRUE(maker.spec().crashed || expected == 0) << "QEMU made an image that is not sound";
        const auto json = nlohmann::json::parse(peer.out);
        const auto number = [&](const char* key) { return json.value(key, std::uint64_t{0}); };
        EXPECT_EQ(report.total_clusters, number("total-clusters"));
        EXPECT_EQ(report.allocated_clusters - uncounted, number("allocated-clusters"));
        EXPECT_EQ(report.compressed_clusters, number("compressed-clusters"));
        EXPECT_EQ(report.fragmented_clusters, number("fragmented-clusters"));
        EXPECT_EQ(report.image_end, number("image-end-offset"));
        if (!report.dirty) {
            EXPECT_EQ(report.leaks, number("leaks"));
        }
    }

    /// Whether the first guest cluster of an image with a data file reads as zeros and keeps its place there, at
    /// offset 0: QEMU takes that for no place.
    static bool keeps_offset_0(const std::string& path) {
        const auto first = value_of(must_open(path, Format::qcow2)->extent({0}, 1));
        return first.depth == 0 && first.kind == Kind::zero && first.host;
    }

    void compare_infos(const ImageMaker& maker, const Image& image) {
        const auto& spec = maker.spec();
        const auto json =
            qemu_img_json({"info", "--output=json", "-f", spec.top().format, maker.top()}, maker.directory().path());
        const auto info = value_of(image.info());
        EXPECT_EQ(format_name(info.format), json["format"].get<std::string>());
        EXPECT_EQ(info.virtual_size, json["virtual-size"].get<std::uint64_t>());
        EXPECT_EQ(info.cluster_size, json.value("cluster-size", std::uint64_t{0}));
        EXPECT_EQ(info.dirty, json["dirty-flag"].get<bool>());
        ASSERT_EQ(info.backing.has_value(), json.contains("backing-filename"));
        if (info.backing) {
            EXPECT_EQ(info.backing->name, json["backing-filename"].get<std::string>());
            EXPECT_EQ(info.backing->format, json.value("backing-filename-format", std::string()));
        }
        if (spec.top().format != "qcow2") return;
        const auto& data = json["format-specific"]["data"];
        EXPECT_EQ(info.version, data["compat"] == "0.10" ? 2 : 3);
        EXPECT_EQ(info.refcount_bits, data["refcount-bits"].get<unsigned>());
        EXPECT_EQ(info.compression, data["compression-type"].get<std::string>());
        EXPECT_EQ(info.extended_l2, data.value("extended-l2", false));
        EXPECT_EQ(info.lazy_refcounts, data.value("lazy-refcounts", false));
        EXPECT_EQ(info.data_file_raw, data.value("data-file-raw", false));
        EXPECT_EQ(info.data_file ? info.data_file->name : "", data.value("data-file", std::string()));
        compare_snapshots(info, json.value("snapshots", nlohmann::json::array()));
        compare_bitmaps(info, data.value("bitmaps", nlohmann::json::array()));
    }

    static void compare_snapshots(const ImageInfo& info, const nlohmann::json& peer) {
        ASSERT_EQ(info.snapshots.size(), peer.size());
        for (std::size_t i = 0; i < peer.size(); ++i) {
            EXPECT_EQ(info.snapshots[i].id, peer[i]["id"].get<std::string>());
            EXPECT_EQ(info.snapshots[i].name, peer[i]["name"].get<std::string>());
            EXPECT_EQ(info.snapshots[i].date_seconds, peer[i]["date-sec"].get<std::uint64_t>());
            EXPECT_EQ(info.snapshots[i].date_nanoseconds, peer[i]["date-nsec"].get<std::uint64_t>());
            EXPECT_EQ(info.snapshots[i].vm_state_bytes, peer[i]["vm-state-size"].get<std::uint64_t>());
        }
    }

    static void compare_bitmaps(const ImageInfo& info, const nlohmann::json& peer) {
        ASSERT_EQ(info.bitmaps.size(), peer.size());
        for (std::size_t i = 0; i < peer.size(); ++i) {
            std::set<std::string> flags;
            for (const auto& flag : peer[i]["flags"]) flags.insert(flag);
            EXPECT_EQ(info.bitmaps[i].name, peer[i]["name"].get<std::string>());
            EXPECT_EQ(info.bitmaps[i].granularity, peer[i]["granularity"].get<std::uint64_t>());
            EXPECT_EQ(info.bitmaps[i].in_use, flags.contains("in-use"));
            EXPECT_EQ(info.bitmaps[i].enabled, flags.contains("auto"));
        }
    }
};

TEST_P(Matrix, AgreesWithQemu) {
    const auto replay = replay_hint();
    std::cout << replay << "\n";
    SCOPED_TRACE(replay);
    auto spec = GetParam();
    if (spec.name.starts_with("mixture")) spec = mixed(std::move(spec));
    ImageMaker maker(spec);
    const auto& format = maker.spec().top().format;
    const auto& directory = maker.directory();

    const auto image = must_open(maker.top(), format_from_name(format));
    EXPECT_EQ(image->format(), *format_from_name(format));
    qemu_convert_to_raw(maker.top(), format, "reference.raw", {}, directory.path());
    ASSERT_NO_FATAL_FAILURE(
        expect_contents(*image, ReferenceFile(directory.file("reference.raw")), directory, maker.random()));
    ASSERT_NO_FATAL_FAILURE(
        expect_maps_agree(peer_map(maker.top(), format, directory.path()), our_map(*image), image->size()));
    ASSERT_NO_FATAL_FAILURE(compare_infos(maker, *image));

    for (const auto& name : maker.snapshots()) {
        SCOPED_TRACE(name);
        qemu_convert_to_raw(maker.top(), format, "reference.raw", name, directory.path());
        const auto snapshot = value_of(image->snapshots().open(name));
        // QEMU gives a snapshot the length that the disk has now.
        const ReferenceFile reference(directory.file("reference.raw"), snapshot->size());
        ASSERT_NO_FATAL_FAILURE(expect_contents(*snapshot, reference, directory, maker.random()));
    }
    for (std::size_t i = 0; i < maker.spec().layers.size(); ++i) {
        SCOPED_TRACE(fmt::format("layer {}", i));
        if (maker.spec().layers[i].format != "qcow2") continue;
        ASSERT_NO_FATAL_FAILURE(compare_checks(maker, i));
    }
}

std::string case_name(const testing::TestParamInfo<ImageSpec>& param) { return param.param.name; }

INSTANTIATE_TEST_SUITE_P(Images, Matrix, testing::ValuesIn(Cases().all()), case_name);

}  // namespace
}  // namespace qcow::test
