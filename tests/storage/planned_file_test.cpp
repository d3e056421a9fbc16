#include "storage/planned_file.h"

#include <gtest/gtest.h>

#include <thread>

#include "base/bits.h"
#include "support/bytes.h"
#include "support/memory_files.h"
#include "support/recording.h"

namespace qcow::test {
namespace {

using Kind = StorageEvent::Kind;

TEST(PlannedFile, WritesNothingUntilItIsCarriedOut) {
    const auto file = memory_storage(repeated(2000, 1));
    const auto planned = value_of(PlannedFile::create(file, MiB));
    EXPECT_TRUE(planned->unchanged());
    ASSERT_TRUE(planned->write({510}, repeated(4, 2)));
    ASSERT_TRUE(planned->write({3000}, repeated(1, 3)));
    EXPECT_FALSE(planned->unchanged());
    EXPECT_EQ(contents_of(*file), repeated(2000, 1));
    auto expected = with(repeated(2000, 1), 510, repeated(4, 2));
    expected.resize(3000);
    expected.push_back(std::byte{3});
    EXPECT_EQ(contents_of(*planned), expected);
    ASSERT_TRUE(planned->carry_out({}));
    EXPECT_EQ(contents_of(*file), expected);
}

TEST(PlannedFile, ThreadsMayChangeIt) {
    const auto planned = value_of(PlannedFile::create(memory_storage(repeated(4096, 1)), 16 * MiB));
    constexpr unsigned count = 4;
    constexpr std::uint64_t pages = 2000;
    const auto place = [](unsigned thread, std::uint64_t page) { return HostOffset{(page * count + thread) * 512}; };
    std::vector<std::jthread> threads;
    for (unsigned thread = 0; thread < count; ++thread) {
        threads.emplace_back([&, thread] {
            const auto bytes = repeated(512, static_cast<std::uint8_t>(thread + 2));
            for (std::uint64_t page = 0; page < pages; ++page) {
                EXPECT_TRUE(planned->write(place(thread, page), bytes));
                Bytes read(512);
                EXPECT_EQ(value_of(planned->read(place(thread, page / 2), read)), 512U);
                EXPECT_EQ(read, bytes);
            }
        });
    }
    threads.clear();
    EXPECT_EQ(value_of(planned->size()), pages * count * 512);
}

TEST(PlannedFile, AStepIsDurableBeforeTheNextOne) {
    StorageLog log;
    const auto file = std::make_shared<RecordingStorage>(memory_storage(repeated(4096, 1)), "file", log);
    const auto planned = value_of(PlannedFile::create(file, MiB));
    ASSERT_TRUE(planned->write({0}, repeated(1, 2)));
    ASSERT_TRUE(planned->flush());
    ASSERT_TRUE(planned->flush());
    ASSERT_TRUE(planned->copy({0}, {4096}, 1024));
    ASSERT_TRUE(planned->write({0}, repeated(1, 3)));
    planned->punch({512}, 512);
    ASSERT_TRUE(planned->carry_out({}));
    std::vector<Kind> kinds;
    for (const auto& event : log.events()) {
        if (event.kind != Kind::mark && event.kind != Kind::flush_begin) kinds.push_back(event.kind);
    }
    EXPECT_EQ(kinds, (std::vector{Kind::size, Kind::write, Kind::flush_end, Kind::write, Kind::write, Kind::flush_end,
                                  Kind::zeroes, Kind::flush_end}));
    auto expected = with(with(repeated(5120, 1), 0, repeated(1, 3)), 512, repeated(512, 0));
    EXPECT_EQ(contents_of(*file), with(expected, 4096, repeated(1, 2)));
}

/// A disk that has no room behind the first 8 KiB.
class FullDisk : public PassThrough {
public:
    using PassThrough::PassThrough;
    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        if (at.value + length > 8192) return std::unexpected(Error{Errc::no_space, name(), "full"});
        return inner().allocate(at, length);
    }
};

TEST(PlannedFile, AFullDiskStaysAsItWas) {
    const auto file = memory_storage(repeated(4096, 1));
    const auto planned = value_of(PlannedFile::create(std::make_shared<FullDisk>(file), MiB));
    ASSERT_TRUE(planned->write({0}, repeated(4, 2)));
    ASSERT_TRUE(planned->write({4096}, repeated(4, 2)));
    ASSERT_TRUE(planned->flush());
    ASSERT_TRUE(planned->copy({0}, {16384}, 4096));
    const auto done = planned->carry_out({});
    ASSERT_FALSE(done);
    EXPECT_EQ(done.error().code, Errc::no_space);
    EXPECT_EQ(contents_of(*file), repeated(4096, 1));
}

TEST(PlannedFile, KnowsWhereItsHolesEnd) {
    const auto planned = value_of(PlannedFile::create(memory_storage(), MiB));
    ASSERT_TRUE(planned->resize(1 * MiB));
    ASSERT_TRUE(planned->write({64 * KiB}, repeated(1, 1)));
    const auto hole = value_of(planned->run({100}, 512 * KiB));
    EXPECT_FALSE(hole.data);
    EXPECT_EQ(hole.length, 64 * KiB - 100);
    const auto data = value_of(planned->run({64 * KiB}, 512 * KiB));
    EXPECT_TRUE(data.data);
    EXPECT_EQ(data.length, 512);
}

TEST(PlannedFile, TakesNoMoreMemoryThanItMay) {
    const auto planned = value_of(PlannedFile::create(memory_storage(), 64 * KiB));
    const auto written = planned->write({0}, repeated(64 * KiB, 1));
    ASSERT_FALSE(written);
    EXPECT_EQ(written.error().code, Errc::limit_exceeded);
}

}  // namespace
}  // namespace qcow::test
