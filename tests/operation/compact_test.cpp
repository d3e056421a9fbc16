// Compaction of images of all kinds: QEMU finds the same contents before and after, and a sound image.

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <stop_token>

#include "base/bits.h"
#include "engine/crash_states.h"
#include "qcow/check.h"
#include "qcow/compact.h"
#include "qcow2/compaction.h"
#include "support/effort.h"
#include "support/memory_files.h"
#include "support/qemu.h"
#include "support/recording.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

/// An image that has seen writes, discards, snapshots and bitmaps.
struct Subject {
    std::string name;
    std::string options;
    std::uint64_t size = 0;
    std::uint64_t cluster_size = 0;
    bool backing = false;
    bool compressed = false;
    bool snapshots = true;
    bool bitmaps = true;
};

void PrintTo(const Subject& subject, std::ostream* out) { *out << subject.name; }

std::vector<Subject> subjects() {
    return {
        {"Usual", "cluster_size=65536", 24 * MiB, 65536},
        {"Small", "cluster_size=512", 2 * MiB, 512},
        {"SmallWide", "cluster_size=512,refcount_bits=64", 2 * MiB, 512},
        {"Large", "cluster_size=2M", 64 * MiB, 2 * MiB},
        {"Version2", "cluster_size=4096,compat=0.10", 8 * MiB, 4096, false, false, true, false},
        {"Version2Overlay", "cluster_size=4096,compat=0.10", 8 * MiB, 4096, true, false, true, false},
        {"Overlay", "cluster_size=16384", 8 * MiB, 16384, true},
        {"Compressed", "cluster_size=65536", 24 * MiB, 65536, false, true},
        {"CompressedSmall", "cluster_size=4096", 4 * MiB, 4096, true, true},
        {"Zstd", "cluster_size=16384,compression_type=zstd", 8 * MiB, 16384, false, true},
        {"Subclusters", "cluster_size=16384,extended_l2=on", 8 * MiB, 16384, true},
        {"OneBit", "cluster_size=4096,refcount_bits=1", 4 * MiB, 4096, false, true, false},
        {"EightBits", "cluster_size=4096,refcount_bits=8", 4 * MiB, 4096, false, true},
        {"DataFile", "cluster_size=4096,data_file=disk.data", 4 * MiB, 4096, false, false, false},
        {"Lazy", "cluster_size=4096,lazy_refcounts=on", 4 * MiB, 4096},
    };
}

class CompactTest : public testing::TestWithParam<Subject> {
protected:
    void make(Random& random) {
        const auto& subject = GetParam();
        const auto cluster = subject.cluster_size;
        Arguments create = {"create", "-q", "-f", "qcow2", "-o", subject.options};
        if (subject.backing) {
            must_qemu_img({"create", "-q", "-f", "raw", "base.raw", std::to_string(subject.size)}, directory_.path());
            must_qemu_io("base.raw", "raw", {fmt::format("write -q -P 77 0 {}", subject.size / 3 / 512 * 512)},
                         directory_.path());
            create.insert(create.end(), {"-b", "base.raw", "-F", "raw"});
        }
        create.insert(create.end(), {"disk.qcow2", std::to_string(subject.size)});
        must_qemu_img(create, directory_.path());
        std::string pattern = random.bytes(cluster * 3 / 10);
        pattern.resize(cluster, 'q');
        put_file(directory_.file("pattern"), pattern);

        std::vector<std::string> live;
        std::uint64_t fresh = 0;  // clusters that are compressed must not be stored
        for (unsigned step = 0; step < 5; ++step) {
            std::vector<std::string> commands;
            for (unsigned i = 0; subject.compressed && i < 40 && (fresh + 1) * cluster <= subject.size / 2; ++i)
                commands.push_back(fmt::format("write -q -c -s pattern {} {}", fresh++ * cluster, cluster));
            for (unsigned i = 0; i < 12; ++i) {
                const auto unit = random.pick({std::uint64_t{512}, cluster, cluster});
                // Data in the other half, holes anywhere.
                const bool write = random.chance(60);
                const auto first = write ? subject.size / 2 : 0;
                const auto at = first + random.below(subject.size - first) / unit * unit;
                const auto length =
                    std::min(random.pick({unit, 2 * unit, 5 * cluster, 40 * cluster}), subject.size - at) / 512 * 512;
                if (write) {
                    commands.push_back(fmt::format("write -q -P {} {} {}",
                                                   random.chance(15) ? 0 : random.between(1, 255), at, length));
                } else {
                    commands.push_back(random.chance(70) ? fmt::format("discard -q {} {}", at, length)
                                                         : fmt::format("write -q -z {} {}", at, length));
                }
            }
            Arguments arguments = {"qemu-io", "-d", "unmap", "-f", "qcow2"};
            for (const auto& command : commands) arguments.insert(arguments.end(), {"-c", command});
            arguments.emplace_back("disk.qcow2");
            const auto done = run(arguments, directory_.path());
            if (done.status != 0) throw std::runtime_error(done.err);
            if (subject.snapshots) {
                live.push_back(fmt::format("s{}", step));
                must_qemu_img({"snapshot", "-c", live.back(), "disk.qcow2"}, directory_.path());
                if (live.size() == 3) {
                    must_qemu_img({"snapshot", "-d", live[random.below(2)], "disk.qcow2"}, directory_.path());
                    std::erase_if(live, [&](const auto& name) { return !has_snapshot(name); });
                }
            }
            if (subject.bitmaps && step < 2)
                must_qemu_img({"bitmap", "--add", "-g", "4096", "disk.qcow2", fmt::format("b{}", step)},
                              directory_.path());
        }
        if (subject.bitmaps) must_qemu_img({"bitmap", "--remove", "disk.qcow2", "b0"}, directory_.path());
    }

    [[nodiscard]] nlohmann::json info() const {
        return qemu_img_json({"info", "--output=json", "disk.qcow2"}, directory_.path());
    }

    [[nodiscard]] bool has_snapshot(const std::string& name) const {
        return std::ranges::any_of(info().value("snapshots", nlohmann::json::array()),
                                   [&](const auto& one) { return one["name"] == name; });
    }

    /// The disk, its snapshots and its bitmaps, as QEMU reads them.
    [[nodiscard]] std::map<std::string, std::string> contents() const {
        std::map<std::string, std::string> contents;
        const auto read = [&](const std::string& name, const std::string& snapshot) {
            std::filesystem::remove(directory_.file("raw"));
            qemu_convert_to_raw("disk.qcow2", "qcow2", "raw", snapshot, directory_.path());
            contents[name] = file_bytes(directory_.file("raw"));
        };
        read("disk", "");
        for (const auto& one : info().value("snapshots", nlohmann::json::array())) read(one["name"], one["name"]);
        const auto image = must_open(directory_.file("disk.qcow2"));
        for (const auto& bitmap : value_of(image->info()).bitmaps) {
            auto& runs = contents["bitmap " + bitmap.name];
            value_of(image->each_dirty(bitmap.name, {0}, image->size(), [&](const DirtyRun& run) -> Result<void> {
                runs += fmt::format("{} {} {}\n", run.start.value, run.length, run.dirty ? 1 : 0);
                return {};
            }));
        }
        return contents;
    }

    /// What QEMU says of each extent, but for its place in the file.
    [[nodiscard]] std::string map() const {
        std::string text;
        nlohmann::json last;
        for (auto extent : qemu_img_json({"map", "--output=json", "disk.qcow2"}, directory_.path())) {
            const auto start = extent["start"].get<std::uint64_t>();
            extent.erase("start");
            extent.erase("length");
            extent.erase("offset");
            if (extent != last) text += fmt::format("{} {}\n", start, extent.dump());
            last = extent;
        }
        return text;
    }

    /// The disk and its snapshots, as we read them.
    static std::map<std::string, Bytes> views(const Files& files) {
        std::map<std::string, Bytes> views;
        const auto image = value_of(open_image(files.at(image_name), {.gate = gate_to(files)}));
        const auto read = [&](const std::string& name, Disk& disk) {
            auto& bytes = views[name];
            bytes.resize(disk.size());
            value_of(disk.read({0}, bytes));
        };
        read("disk", *image);
        for (const auto& snapshot : value_of(image->snapshots().list()))
            read(snapshot.name, *value_of(image->snapshots().open(snapshot.id)));
        return views;
    }

    [[nodiscard]] CompactJob job() const { return {.image = {.location = {.path = directory_.file("disk.qcow2")}}}; }
    [[nodiscard]] std::uint64_t length() const { return std::filesystem::file_size(directory_.file("disk.qcow2")); }

    TemporaryDirectory directory_;
};

TEST_P(CompactTest, KeepsTheContents) {
    const auto& subject = GetParam();
    for (unsigned round = 0; round < rounds(2); ++round) {
        auto random = Random::named(fmt::format("{}/{}", subject.name, round));
        std::filesystem::remove(directory_.file("disk.qcow2"));
        make(random);
        SCOPED_TRACE(fmt::format("round {}, {}", round, replay_hint()));
        const auto before = contents();
        const auto mapped = map();
        const auto bytes = file_bytes(directory_.file("disk.qcow2"));

        auto task = job();
        task.zeroes = sanitized ? random.chance(50) : round % 2 == 1;
        task.compress = task.zeroes && subject.name != "DataFile";
        task.dry_run = true;
        const auto planned = value_of(compact(task));
        EXPECT_EQ(file_bytes(directory_.file("disk.qcow2")), bytes) << "a dry run";
        task.dry_run = false;
        const auto done = value_of(compact(task));
        EXPECT_EQ(done.size_after, length());
        EXPECT_EQ(planned.size_after, done.size_after);
        EXPECT_EQ(planned.moved_clusters, done.moved_clusters);
        EXPECT_EQ(done.size_before, bytes.size());
        EXPECT_LT(done.size_after, done.size_before);
        must_qemu_img({"check", "disk.qcow2"}, directory_.path());
        EXPECT_TRUE(value_of(check({.location = {.path = directory_.file("disk.qcow2")}})).report.clean());
        EXPECT_TRUE(contents() == before);
        if (!task.zeroes) {
            EXPECT_EQ(map(), mapped);
        }

        const auto compacted = file_bytes(directory_.file("disk.qcow2"));
        EXPECT_FALSE(value_of(compact(task)).changed);
        EXPECT_EQ(file_bytes(directory_.file("disk.qcow2")), compacted) << "a second time";
        must_qemu_io("disk.qcow2", "qcow2", {"write -q -P 9 0 64k"}, directory_.path());
        must_qemu_img({"check", "disk.qcow2"}, directory_.path());
    }
}

/// Without snapshots it is as short as a new image of the same contents.
TEST_P(CompactTest, IsAsShortAsANewImage) {
    const auto& subject = GetParam();
    if (subject.backing || subject.name == "DataFile") return;  // QEMU's new image holds something else
    auto random = Random::named(subject.name + " short");
    make(random);
    for (const auto& one : info().value("snapshots", nlohmann::json::array()))
        must_qemu_img({"snapshot", "-d", one["name"], "disk.qcow2"}, directory_.path());
    if (subject.bitmaps) must_qemu_img({"bitmap", "--remove", "disk.qcow2", "b1"}, directory_.path());
    auto task = job();
    task.zeroes = true;
    value_of(compact(task));
    must_qemu_img({"convert", "-O", "qcow2", "-o", subject.options, "disk.qcow2", "new.qcow2"}, directory_.path());
    const auto shortest = std::filesystem::file_size(directory_.file("new.qcow2"));
    EXPECT_LE(length(), shortest + shortest / 50);
}

/// Some moments, and what a power loss may leave of the writes that are not durable then.
TEST_P(CompactTest, PowerLossLosesNothing) {
    const auto& subject = GetParam();
    if (subject.backing || subject.name == "DataFile" || subject.cluster_size > 65536) return;
    auto random = Random::named(subject.name + " power");
    make(random);
    const Files before = {{image_name, load(directory_.file("disk.qcow2"), image_name)}};
    const auto expected = views(before);
    CompactJob task;
    task.workers = 1;
    task.zeroes = true;
    task.compress = subject.compressed;
    const auto after = copy_of(before);
    StorageLog log;
    const std::uint64_t batch = 8 * subject.cluster_size;
    value_of(qcow2::compact_image(std::make_shared<RecordingStorage>(after.at(image_name), image_name, log), nullptr,
                                  task, {}, batch));
    EXPECT_TRUE(views(after) == expected);
    const auto shortest = value_of(after.at(image_name)->size());
    CrashStates states(log, before);
    std::vector<std::size_t> moments;
    for (unsigned i = 0; i < rounds(12); ++i) moments.push_back(random.between(1, log.events().size()));
    std::ranges::sort(moments);
    for (const auto moment : moments) {
        states.advance(moment);
        const auto seed = random.below(1U << 30);
        const auto percent = random.pick({0U, 10U, 50U, 90U, 100U});
        const auto crashed = states.build([&](std::size_t event, std::uint64_t sector) {
            return Random(seed ^ event << 32 ^ sector).chance(percent);
        });
        SCOPED_TRACE(fmt::format("power loss before event {}, seed {}, {}%", moment, seed, percent));
        const auto image = value_of(open_image(crashed.at(image_name)));
        const auto report = value_of(image->check({.workers = 1}));
        EXPECT_EQ(report.corruptions + report.errors, 0U)
            << report.findings.front().place << ": " << report.findings.front().what;
        ASSERT_TRUE(views(crashed) == expected);
        value_of(qcow2::compact_image(crashed.at(image_name), nullptr, task, {}));
        ASSERT_TRUE(views(crashed) == expected) << "after a second run";
        EXPECT_TRUE(value_of(value_of(open_image(crashed.at(image_name)))->check({.workers = 1})).clean());
        // What snapshots shared may be there twice, if it was moving.
        EXPECT_LE(value_of(crashed.at(image_name)->size()), shortest + 2 * batch);
        EXPECT_FALSE(value_of(qcow2::compact_image(crashed.at(image_name), nullptr, task, {})).changed);
    }
}

/// It ends between two batches, and leaves nothing behind.
TEST_P(CompactTest, CanBeCancelled) {
    const auto& subject = GetParam();
    if (subject.backing || subject.name == "DataFile" || subject.cluster_size > 65536) return;
    auto random = Random::named(subject.name + " cancelled");
    make(random);
    const Files files = {{image_name, load(directory_.file("disk.qcow2"), image_name)}};
    const auto expected = views(files);
    std::stop_source stop;
    JobControl control;
    control.progress = [&](std::uint64_t, std::uint64_t) { stop.request_stop(); };
    control.stop = stop.get_token();
    const auto cancelled = qcow2::compact_image(files.at(image_name), nullptr, {}, control, 2 * subject.cluster_size);
    EXPECT_TRUE(fails(cancelled, Errc::cancelled));
    EXPECT_TRUE(views(files) == expected);
    EXPECT_TRUE(value_of(value_of(open_image(files.at(image_name)))->check({.workers = 1})).clean());
    EXPECT_TRUE(value_of(qcow2::compact_image(files.at(image_name), nullptr, {}, {})).changed);
    EXPECT_TRUE(views(files) == expected);
}

INSTANTIATE_TEST_SUITE_P(Kinds, CompactTest, testing::ValuesIn(subjects()),
                         [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace qcow::test
