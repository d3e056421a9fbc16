// Where in the file a guest's data come to lie, and what a process that dies leaves reserved.

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "base/bits.h"
#include "engine/image_kinds.h"
#include "qcow/create.h"
#include "support/bytes.h"
#include "support/counting_storage.h"
#include "support/disks.h"
#include "support/memory_files.h"
#include "support/random.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t piece = 256 * KiB;

std::shared_ptr<Storage> new_file(std::uint64_t size, std::uint64_t cluster_size = 64 * KiB) {
    const auto file = memory_storage();
    CreateOptions options;
    options.size = size;
    options.cluster_size = cluster_size;
    value_of(create_image({file, nullptr}, options));
    return file;
}

std::shared_ptr<Image> open_writable(const std::shared_ptr<Storage>& file) {
    return value_of(open_image(file, {.writable = true, .format = Format::qcow2}));
}

std::uint64_t data_extents(Disk& disk) {
    std::uint64_t count = 0;
    value_of(each_extent(disk, {0}, disk.size(), [&](const Extent& extent) -> Result<void> {
        count += extent.kind == Extent::Kind::data ? 1 : 0;
        return {};
    }));
    return count;
}

TEST(LayoutTest, OneLargeWriteIsOneExtent) {
    for (const auto cluster_size : {4 * KiB, 64 * KiB, 2 * MiB}) {
        const auto image = open_writable(new_file(64 * MiB, cluster_size));
        value_of(image->write({4 * MiB}, Bytes(2 * MiB, std::byte{1})));
        // A batch of entries ends with a page of the table.
        EXPECT_LE(data_extents(*image), cluster_size == 4 * KiB ? 4U : 1U);
    }
}

TEST(LayoutTest, PiecesOfOneWriteLieInOrderWhoeverComesFirst) {
    const auto image = open_writable(new_file(64 * MiB));
    const Bytes bytes(piece, std::byte{1});
    for (const std::uint64_t i : {1, 0, 3, 2, 7, 4, 6, 5}) value_of(image->write({i * piece}, bytes));
    EXPECT_LE(data_extents(*image), 4U);
}

/// As a copy over NBD is written: many requests in flight, on several threads, from one or four places on.
TEST(LayoutTest, StreamsOnThreads) {
    for (const unsigned streams : {1U, 4U}) {
        const auto image = open_writable(new_file(256 * MiB));
        const Bytes bytes(piece, std::byte{1});
        const std::uint64_t stream_pieces = image->size() / piece / streams;
        std::vector<std::atomic<std::uint64_t>> next(streams);
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < 8; ++t) {
            threads.emplace_back([&, stream = t % streams] {
                for (auto i = next[stream]++; i < stream_pieces; i = next[stream]++)
                    value_of(image->write({(stream * stream_pieces + i) * piece}, bytes));
            });
        }
        for (auto& thread : threads) thread.join();
        EXPECT_LE(data_extents(*image), streams == 1 ? 8U : 32U);
    }
}

/// On a disk where nearly every cluster is near one that was written before.
TEST(LayoutTest, WritesHereAndThereCostNoFlushOfTheirOwn) {
    const auto file = std::make_shared<CountingStorage>(new_file(2 * GiB));
    const auto image = open_writable(file);
    auto random = Random::named("here and there");
    const auto before = file->flushes.load();
    constexpr unsigned requests = 2000;
    for (unsigned i = 0; i < requests; ++i) {
        value_of(image->write({random.below(2 * GiB / (4 * KiB)) * 4 * KiB}, Bytes(4 * KiB, std::byte{1})));
        value_of(image->flush());
    }
    EXPECT_LE(file->flushes - before, requests * 3 / 2);
}

/// The file as a killed process leaves it.
std::uint64_t leaks_when_killed(const std::shared_ptr<Storage>& file) {
    const auto left = memory_storage(contents_of(*file));
    const auto report = value_of(value_of(open_image(left, {.format = Format::qcow2}))->check({}));
    EXPECT_EQ(report.corruptions + report.errors, 0U);
    return report.leaks;
}

TEST(LayoutTest, AShortSessionThatIsKilledLeaksLittle) {
    const auto file = new_file(128 * MiB);
    const auto image = open_writable(file);
    value_of(image->write({0}, Bytes(512, std::byte{1})));
    value_of(image->flush());
    EXPECT_LE(leaks_when_killed(file), 2U);
    auto random = Random::named("killed");
    for (std::uint64_t written = 2; written < 40; ++written) {
        value_of(image->write({random.below(2048) * 64 * KiB}, Bytes(512, std::byte{1})));
        value_of(image->flush());
        EXPECT_LE(leaks_when_killed(file), 4 * written);
    }
}

/// The entry says which subclusters are zeros. So the cluster need not be copied, though a snapshot has it, too.
TEST(LayoutTest, ZeroedSubclustersOfASharedClusterCostNoCopy) {
    ImageKind kind;
    kind.create.size = 1 * MiB;
    kind.create.extended_l2 = true;
    kind.contents = ImageKind::Contents::plain;
    kind.snapshot = true;
    auto random = Random::named("shared");
    const auto prepared = prepare(kind, random);
    const auto image = value_of(open_kind(kind, prepared.files, true));
    std::uint64_t at = 0;
    while (!value_of(image->extent({at}, 64 * KiB)).host) at += 64 * KiB;
    const auto before = value_of(image->extent({at}, 2 * KiB));
    value_of(image->write_zeroes({at + 26 * KiB}, 2 * KiB));
    EXPECT_EQ(value_of(image->extent({at}, 2 * KiB)).host, before.host);
    EXPECT_EQ(value_of(image->extent({at + 26 * KiB}, 64 * KiB)).kind, Extent::Kind::zero);
    auto expected = prepared.contents;
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(at + 26 * KiB), 2 * KiB, std::byte{0});
    Bytes found(expected.size());
    value_of(image->read({0}, found));
    EXPECT_TRUE(found == expected);
    value_of(value_of(image->snapshots().open("first"))->read({0}, found));
    EXPECT_TRUE(found == prepared.contents);
    value_of(image->close());
    EXPECT_TRUE(value_of(image->check({})).clean());
}

/// What is cut or given up at the end of the file makes it shorter; what others put there stays.
TEST(LayoutTest, FreeClustersAreCutOffTheEnd) {
    const auto file = new_file(64 * MiB);
    const auto empty = value_of(file->size());
    {
        const auto image = open_writable(file);
        value_of(image->write({0}, Bytes(1 * MiB, std::byte{1})));
        value_of(image->write({32 * MiB}, Bytes(8 * MiB, std::byte{1})));
        value_of(image->close());
    }
    const auto full = value_of(file->size());
    EXPECT_GE(full, empty + 9 * MiB);
    {
        const auto image = open_writable(file);
        value_of(image->resize(16 * MiB, Image::Shrink::allow));
        value_of(image->close());
    }
    EXPECT_LE(value_of(file->size()), full - 8 * MiB);

    const Bytes behind(64 * KiB, std::byte{9});
    const auto end = value_of(file->size());
    value_of(file->write({end}, behind));
    {
        const auto image = open_writable(file);
        value_of(image->discard({0}, image->size()));
        value_of(image->close());
    }
    Bytes found(behind.size());
    value_of(file->read({end}, found));
    EXPECT_TRUE(found == behind);
}

}  // namespace
}  // namespace qcow::test
