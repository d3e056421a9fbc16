#include "qcow2/metadata/allocator.h"

#include <gtest/gtest.h>

#include <array>
#include <optional>
#include <set>

#include "base/endian.h"
#include "qcow/create.h"
#include "support/bytes.h"
#include "support/faulty.h"
#include "support/recording.h"
#include "support/result.h"

namespace qcow::qcow2 {
namespace {

using test::Bytes;
using test::fails;
using test::Faults;
using test::must;
using test::repeated;

constexpr std::uint64_t cluster = 4096;

/// A new image of 1 MiB, whose file is in memory.
class AllocatorTest : public testing::Test {
protected:
    AllocatorTest() { open({}); }

    struct Arrangement {
        unsigned refcount_bits = 16;
        bool punch = true;
        std::uint64_t behind = 0;          ///< clusters behind the last one that is counted
        std::uint64_t counted_behind = 0;  ///< this one of those that would come behind the file's end is counted, too
    };
    void open(const Arrangement& arrangement) {
        file_ = memory_storage({}, "image");
        CreateOptions options{.size = std::uint64_t{1} << 20, .cluster_size = cluster};
        options.refcount_bits = arrangement.refcount_bits;
        must(create_image({file_, nullptr}, options));
        refcount_bits_ = arrangement.refcount_bits;
        must(file_->resize((clusters() + arrangement.behind) * cluster));
        Bytes first(cluster);
        must(file_->read({0}, first));
        const auto faulty = std::make_shared<test::FaultyStorage>(file_, faults_);
        allocator_.reset();
        metadata_ =
            std::make_unique<Metadata>(must(format::parse_header(first)),
                                       std::make_shared<test::RecordingStorage>(faulty, "image", log_), 1 << 20);
        map_ = std::make_unique<MetadataMap>(12U);
        must(map_->load(*metadata_));
        write_back_ = std::make_unique<WriteBack>(*metadata_, nullptr, true);
        if (arrangement.counted_behind != 0) {
            Bytes entry(8);
            must(file_->read(metadata_->state().refcount_table, entry));
            must(file_->write({load_be<std::uint64_t>(entry, 0) + (clusters() + arrangement.counted_behind) * 2},
                              test::u16(1)));
        }
        allocator_ = std::make_unique<Allocator>(*metadata_, *write_back_, *map_, epochs_, arrangement.punch);
        must(allocator_->load());
        old_ = counted();
        old_clusters_ = clusters();
    }

    /// The file's length.
    [[nodiscard]] std::uint64_t clusters() const { return must(file_->size()) / cluster; }

    /// The refcount that the file has.
    [[nodiscard]] std::uint64_t on_disk(std::uint64_t number) const {
        Bytes block(8);
        must(file_->read(metadata_->state().refcount_table, block));  // a block counts thousands
        const HostOffset at{load_be<std::uint64_t>(block, 0)};
        if (refcount_bits_ == 1) {
            must(file_->read(at + number / 8, block));
            return std::to_integer<unsigned>(block[0]) >> number % 8 & 1;
        }
        must(file_->read(at + number * 2, block));
        return load_be<std::uint16_t>(block, 0);
    }
    [[nodiscard]] std::set<std::uint64_t> counted() const {
        std::set<std::uint64_t> result;
        for (std::uint64_t number = 0; number < 2000; ++number) {
            if (on_disk(number) != 0) result.insert(number);
        }
        return result;
    }
    /// The refcount now, in the cache or in the file.
    std::uint64_t count(std::uint64_t number) {
        must(write_back_->write_refcounts());
        return on_disk(number);
    }

    [[nodiscard]] Bytes bytes_of(std::uint64_t number) const {
        Bytes bytes(cluster);
        must(file_->read({number * cluster}, bytes));
        return bytes;
    }
    void fill(std::uint64_t number) { must(file_->write({number * cluster}, repeated(cluster, 7))); }

    /// One cluster of the guest's.
    std::uint64_t take_one(std::uint64_t guest) { return must(allocator_->take(guest, 1)).first; }

    /// A flush of the image, which succeeds.
    Result<void> flush() {
        auto retired = allocator_->begin_flush();
        must(write_back_->write_all());
        must(write_back_->sync());
        return allocator_->end_flush(std::move(retired));
    }

    std::shared_ptr<Storage> file_;
    test::StorageLog log_;
    std::shared_ptr<Faults> faults_ = std::make_shared<Faults>();
    unsigned refcount_bits_ = 16;
    std::unique_ptr<Metadata> metadata_;
    std::unique_ptr<MetadataMap> map_;
    std::unique_ptr<WriteBack> write_back_;
    Epochs epochs_;
    std::unique_ptr<Allocator> allocator_;
    std::set<std::uint64_t> old_;  ///< what was counted in the new image
    std::uint64_t old_clusters_ = 0;
};

TEST_F(AllocatorTest, WhatIsHandedOutIsCountedAndZerosAndBothAreDurable) {
    const auto expect_ready = [&](std::uint64_t first, std::uint64_t count) {
        for (auto number = first; number < first + count; ++number) {
            EXPECT_FALSE(old_.contains(number));
            EXPECT_EQ(on_disk(number), 1U);
            EXPECT_EQ(bytes_of(number), Bytes(cluster));
        }
        EXPECT_EQ(log_.events().back().kind, test::StorageEvent::Kind::flush_end) << "nothing was written since";
    };
    const auto run = must(allocator_->take(10, 3));
    EXPECT_GE(run.count, 1U);
    EXPECT_LE(run.count, 3U);
    expect_ready(run.first, run.count);
    const auto table = must(allocator_->take_table());
    EXPECT_EQ(table.value % cluster, 0U);
    expect_ready(table.value / cluster, 1);
    const auto tables = must(allocator_->take_contiguous(5));
    EXPECT_EQ(tables.count, 5U);
    expect_ready(tables.first, 5);
    const auto stream = must(allocator_->take_bytes(1000));
    expect_ready(stream.value / cluster, 1);
}

TEST_F(AllocatorTest, NothingIsHandedOutTwice) {
    std::set<std::uint64_t> taken = old_;
    const auto add = [&](std::uint64_t first, std::uint64_t count) {
        for (auto number = first; number < first + count; ++number) EXPECT_TRUE(taken.insert(number).second) << number;
    };
    for (std::uint64_t guest = 0; guest < 100; ++guest) {
        const auto run = must(allocator_->take(guest * 37 % 100, 1 + guest % 4));
        add(run.first, run.count);
        if (guest % 10 == 0) add(must(allocator_->take_table()).value / cluster, 1);
        if (guest % 25 == 0) add(must(allocator_->take_contiguous(3)).first, 3);
        if (guest % 20 == 0) add(must(allocator_->take_bytes(cluster)).value / cluster, 1);
    }
}

/// A guest that writes front to back has few flushes to wait for, and its data lie front to back.
TEST_F(AllocatorTest, ReservationsGrowWithUse) {
    const auto flushes = [&] {
        return std::ranges::count(log_.events(), test::StorageEvent::Kind::flush_end, &test::StorageEvent::kind);
    };
    const auto before = flushes();
    const auto first = take_one(0);
    for (std::uint64_t guest = 1; guest < 64; ++guest) EXPECT_EQ(take_one(guest), first + guest);
    EXPECT_LE(flushes() - before, 10);
    for (int i = 0; i < 64; ++i) must(allocator_->take_table());
    EXPECT_LE(flushes() - before, 20);
}

TEST_F(AllocatorTest, StreamsShareClusters) {
    const auto first = must(allocator_->take_bytes(1000));
    EXPECT_EQ(first.value % cluster, 0U);
    EXPECT_EQ(must(allocator_->take_bytes(2000)), first + 1000);
    EXPECT_EQ(count(first.value / cluster), 2U);
    EXPECT_EQ(must(allocator_->take_bytes(2000)), first + 3000) << "it goes on in the next cluster";
    EXPECT_EQ(count(first.value / cluster), 3U);
    EXPECT_EQ(count(first.value / cluster + 1), 1U);
    EXPECT_EQ(must(allocator_->take_bytes(8192 - 5000)), first + 5000) << "just up to the end";
    EXPECT_EQ(count(first.value / cluster + 1), 2U);
    EXPECT_EQ(must(allocator_->take_bytes(10)), first + 8192);
    EXPECT_EQ(count(first.value / cluster + 2), 1U);
}

TEST_F(AllocatorTest, AStreamIsNotTornApart) {
    const auto first = must(allocator_->take_bytes(1000));
    const auto next = must(allocator_->take_contiguous(1));
    ASSERT_EQ(next.first, first.value / cluster + 1);
    const auto second = must(allocator_->take_bytes(4000));
    EXPECT_EQ(second.value % cluster, 0U) << "the next cluster is another one's";
    EXPECT_EQ(count(first.value / cluster), 1U);
    EXPECT_EQ(count(second.value / cluster), 1U);
}

TEST_F(AllocatorTest, StreamsDoNotShareWhatCannotBeCountedTwice) {
    open({.refcount_bits = 1});
    const auto first = must(allocator_->take_bytes(1000));
    const auto second = must(allocator_->take_bytes(1000));
    EXPECT_NE(first.value / cluster, second.value / cluster);
    EXPECT_EQ(second.value % cluster, 0U);
}

TEST_F(AllocatorTest, ARetiredClusterIsFreeAfterTheNextFlush) {
    const auto number = take_one(0);
    fill(number);
    allocator_->retire({number, 1}, false);
    EXPECT_EQ(allocator_->retired_bytes(), cluster);
    EXPECT_EQ(count(number), 1U);
    must(flush());
    EXPECT_EQ(allocator_->retired_bytes(), 0U);
    EXPECT_EQ(count(number), 0U);
    EXPECT_EQ(bytes_of(number), Bytes(cluster));
}

TEST_F(AllocatorTest, WhatIsFreeInTheFileIsTakenBeforeItGrows) {
    open({.punch = false});
    const auto run = must(allocator_->take_contiguous(20));
    for (auto number = run.first; number < run.end(); ++number) fill(number);
    must(allocator_->take_contiguous(1));
    allocator_->retire(run, false);
    must(flush());
    const auto end = clusters();
    for (std::uint64_t guest = 0; guest < 16; ++guest) {
        const auto number = take_one(guest);
        EXPECT_GE(number, run.first);
        EXPECT_LT(number, run.end());
        EXPECT_EQ(bytes_of(number), Bytes(cluster)) << "whatever was there before";
    }
    EXPECT_EQ(clusters(), end);
}

TEST_F(AllocatorTest, ScatteredClustersAreTakenOneByOne) {
    const auto run = must(allocator_->take_contiguous(16));
    std::set<std::uint64_t> free;
    for (auto number = run.first; number < run.end(); number += 2) {
        allocator_->retire({number, 1}, false);
        free.insert(number);
    }
    must(flush());
    for (std::uint64_t guest = 0; guest < 8; ++guest) {
        const auto taken = must(allocator_->take(guest, 4));
        EXPECT_EQ(taken.count, 1U);
        EXPECT_EQ(free.erase(taken.first), 1U) << taken.first;
    }
}

/// A file that was cut short: its refcounts still tell of what was there.
TEST_F(AllocatorTest, AFileGoesOnBehindWhatIsCounted) {
    open({.counted_behind = 5});
    EXPECT_GE(must(allocator_->take_contiguous(3)).first, old_clusters_ + 6);
    for (std::uint64_t guest = 0; guest < 20; ++guest) EXPECT_NE(take_one(guest), old_clusters_ + 5);
}

TEST_F(AllocatorTest, RefcountBlocksAreAddedAsTheFileGrows) {
    open({.refcount_bits = 64});  // a block counts 512 clusters
    const auto run = must(allocator_->take_contiguous(1200));
    EXPECT_EQ(run.count, 1200U);
    EXPECT_GT(run.first, old_clusters_) << "blocks come first";
    must(allocator_->take_contiguous(1));
}

/// What is retired during a flush may be found by a power loss: it waits for the next one.
TEST_F(AllocatorTest, ARetiredClusterWaitsForAFlushThatBeginsAfterwards) {
    const auto number = take_one(0);
    const auto during = take_one(1);
    allocator_->retire({number, 1}, false);
    auto retired = allocator_->begin_flush();
    allocator_->retire({during, 1}, false);
    EXPECT_EQ(allocator_->retired_bytes(), cluster);
    must(allocator_->end_flush(std::move(retired)));
    EXPECT_EQ(count(number), 0U);
    EXPECT_EQ(count(during), 1U);
    must(flush());
    EXPECT_EQ(count(during), 0U);
}

TEST_F(AllocatorTest, AFlushThatFailedFreesNothing) {
    const auto number = take_one(0);
    allocator_->retire({number, 1}, false);
    allocator_->flush_failed(allocator_->begin_flush());
    EXPECT_EQ(count(number), 1U);
    must(flush());
    EXPECT_EQ(count(number), 0U);
}

TEST_F(AllocatorTest, ARetiredClusterWaitsForRequestsThatMayUseIt) {
    const auto number = take_one(0);
    fill(number);
    std::optional<Epochs::Guard> request(std::in_place, epochs_);
    allocator_->retire({number, 1}, false);
    must(flush());
    must(flush());
    EXPECT_EQ(count(number), 1U);
    EXPECT_EQ(bytes_of(number), repeated(cluster, 7));
    request.reset();
    must(flush());
    EXPECT_EQ(count(number), 0U);
}

TEST_F(AllocatorTest, ASharedClusterIsFreeWithItsLastReference) {
    const auto number = must(allocator_->take_bytes(100)).value / cluster;
    must(allocator_->take_bytes(100));
    fill(number);
    allocator_->retire({number, 1}, false);
    must(flush());
    EXPECT_EQ(count(number), 1U);
    EXPECT_EQ(bytes_of(number), repeated(cluster, 7));
    allocator_->retire({number, 1}, false);
    must(flush());
    EXPECT_EQ(count(number), 0U);
    EXPECT_EQ(bytes_of(number), Bytes(cluster));
    EXPECT_EQ(must(allocator_->take_bytes(100)).value % cluster, 0U) << "no stream goes on in a free cluster";
}

TEST_F(AllocatorTest, WithoutPunchingTheBytesStay) {
    open({.punch = false});
    const auto number = take_one(0);
    fill(number);
    allocator_->retire({number, 1}, false);
    must(flush());
    EXPECT_EQ(count(number), 0U);
    EXPECT_EQ(bytes_of(number), repeated(cluster, 7));
}

TEST_F(AllocatorTest, ATableIsMetadataUntilItIsFree) {
    const auto table = must(allocator_->take_table());
    must(map_->add(table, cluster, MetadataMap::Kind::l2_table));
    const std::array<std::uint64_t, 1> word = {0x1234};
    must(write_back_->store(table, word, mapping_pages));
    allocator_->retire({table.value / cluster, 1}, true);
    EXPECT_FALSE(map_->find(table, 1).empty());
    must(flush());
    EXPECT_TRUE(map_->find(table, 1).empty());
    EXPECT_EQ(must(metadata_->words().load(table)), 0U) << "the cache does not remember it";
    EXPECT_EQ(count(table.value / cluster), 0U);
}

TEST_F(AllocatorTest, MetadataAreNotFreedAsGuestData) {
    allocator_->retire({0, 1}, false);
    EXPECT_TRUE(fails(flush(), Errc::corrupt, {"header", "freed with guest data"}));
    EXPECT_EQ(on_disk(0), 1U);
    EXPECT_TRUE(fails(write_back_->verify_writable(), Errc::corrupt));
    EXPECT_TRUE(metadata_->state().has(format::incompatible::corrupt));
}

TEST_F(AllocatorTest, MetadataThatAreNotCountedAreNotHandedOut) {
    must(map_->add({clusters() * cluster}, cluster, MetadataMap::Kind::bitmaps));
    EXPECT_TRUE(fails(allocator_->take(0, 1), Errc::corrupt, {"bitmap", "refcount 0"}));
    EXPECT_TRUE(metadata_->state().has(format::incompatible::corrupt));
}

/// What is not counted may be somebody else's.
TEST_F(AllocatorTest, AClusterThatIsNotCountedIsNotPunched) {
    open({.behind = 3});
    const auto number = old_clusters_ - 1;
    fill(number);
    allocator_->retire({number, 1}, false);
    EXPECT_TRUE(fails(flush(), Errc::corrupt));
    EXPECT_EQ(bytes_of(number), repeated(cluster, 7));
}

TEST_F(AllocatorTest, WhatIsOnlyReservedIsGivenBack) {
    auto kept = old_;
    for (int i = 0; i < 2; ++i) {
        kept.insert(must(allocator_->take_table()).value / cluster);
        kept.insert(must(allocator_->take_bytes(4000)).value / cluster);
    }
    for (std::uint64_t guest = 0; guest < 20; ++guest) kept.insert(take_one(guest));
    must(allocator_->take_bytes(90));
    ASSERT_NE(counted(), kept) << "nothing is reserved";
    must(allocator_->give_back());
    EXPECT_EQ(counted(), kept);
    EXPECT_EQ(clusters(), *kept.rbegin() + 1) << "the file ends with what is in use";
    must(allocator_->give_back());
    EXPECT_EQ(counted(), kept);
    const auto stream = must(allocator_->take_bytes(10));
    EXPECT_EQ(stream.value % cluster, 0U) << "streams begin again";
}

TEST_F(AllocatorTest, AFileInWhichNothingWasKeptGetsItsLengthBack) {
    const auto run = must(allocator_->take(0, 8));
    allocator_->retire(run, false);
    allocator_->retire(must(allocator_->take_contiguous(4)), false);
    must(flush());
    must(allocator_->give_back());
    EXPECT_EQ(counted(), old_);
    EXPECT_EQ(clusters(), old_clusters_);
}

TEST_F(AllocatorTest, WhatSomebodyPutBehindTheLastClusterIsNotCutOff) {
    open({.behind = 40});
    allocator_->retire(must(allocator_->take_contiguous(4)), false);
    must(flush());
    must(allocator_->give_back());
    EXPECT_EQ(counted(), old_);
    EXPECT_EQ(clusters(), old_clusters_);
}

/// The last of the space is handed out cluster by cluster, and no cluster is lost.
TEST_F(AllocatorTest, AFullFileSystemIsUsedToTheEnd) {
    constexpr std::uint64_t room = 13;
    faults_->set_room((old_clusters_ + room) * cluster);
    std::set<std::uint64_t> taken;
    Result<ClusterRun> run;
    for (std::uint64_t guest = 0; (run = allocator_->take(guest * 5 % 256, 4)); ++guest) {
        for (auto number = run->first; number < run->end(); ++number) EXPECT_TRUE(taken.insert(number).second);
        ASSERT_LT(guest, 100U);
    }
    EXPECT_TRUE(fails(run, Errc::no_space));
    EXPECT_EQ(taken.size(), room);
    EXPECT_TRUE(fails(allocator_->take_table(), Errc::no_space));
    EXPECT_TRUE(fails(allocator_->take_contiguous(2), Errc::no_space));
    EXPECT_TRUE(fails(allocator_->take_bytes(2), Errc::no_space));
    must(write_back_->verify_writable());
    EXPECT_EQ(counted().size(), old_.size() + room) << "what failed is not counted";
    // It goes on where there is room again.
    allocator_->retire({*taken.begin(), 1}, false);
    must(flush());
    EXPECT_EQ(must(allocator_->take(200, 4)).first, *taken.begin());
    faults_->set_room({});
    must(allocator_->take(201, 4));
}

TEST_F(AllocatorTest, WhatCannotBeCountedIsGivenBack) {
    const auto attempt = [&](auto&& take) {
        faults_->arm({.operation = Faults::Operation::write, .code = Errc::no_space});
        EXPECT_TRUE(fails(take(), Errc::no_space));
        EXPECT_EQ(faults_->hits(), 1U);
        EXPECT_EQ(count(old_clusters_), 0U);
    };
    attempt([&] { return allocator_->take_contiguous(2); });
    attempt([&] { return allocator_->take(0, 1); });
    EXPECT_EQ(take_one(0), old_clusters_);
}

TEST_F(AllocatorTest, WhatCannotBeMadeDurableIsNotHandedOut) {
    faults_->arm({.operation = Faults::Operation::flush});
    EXPECT_TRUE(fails(allocator_->take(0, 1), Errc::io));
    EXPECT_FALSE(write_back_->verify_writable()) << "what is on disk can no longer be told";
    EXPECT_FALSE(allocator_->take(0, 1));
}

TEST_F(AllocatorTest, ReferencesAreCountedAgain) {
    const auto leaked = take_one(0);
    must(allocator_->give_back());
    ASSERT_EQ(on_disk(leaked), 1U);
    must(allocator_->rebuild());
    EXPECT_EQ(counted(), old_);
    EXPECT_EQ(take_one(0), leaked);
}

}  // namespace
}  // namespace qcow::qcow2
