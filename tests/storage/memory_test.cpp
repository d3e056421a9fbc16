#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "qcow/storage.h"
#include "support/bytes.h"
#include "support/result.h"

namespace qcow {
namespace {

using namespace qcow::test;

Bytes contents(const Storage& storage) {
    Bytes result(must(storage.size()));
    must(storage.read({0}, result));
    return result;
}

TEST(MemoryStorage, HasTheBytesThatItWasGiven) {
    const auto storage = memory_storage(text_bytes("0123456789"));
    EXPECT_EQ(must(storage->size()), 10U);
    EXPECT_EQ(must(storage->allocated()), 10U);
    Bytes read(4);
    EXPECT_EQ(must(storage->read({3}, read)), 4U);
    EXPECT_EQ(read, text_bytes("3456"));
}

TEST(MemoryStorage, IsEmptyByDefault) {
    const auto storage = memory_storage();
    EXPECT_EQ(must(storage->size()), 0U);
    EXPECT_EQ(storage->name(), "memory");
}

TEST(MemoryStorage, HasANameForMessagesAndAnIdentityOfItsOwn) {
    const auto a = memory_storage({}, "disk");
    const auto b = memory_storage({}, "disk");
    EXPECT_EQ(a->name(), "disk");
    EXPECT_EQ(a->identity(), a->identity());
    EXPECT_NE(a->identity(), b->identity());
}

TEST(MemoryStorage, ReadsZerosPastTheEndAndTellsHowMuchCameFromBefore) {
    const auto storage = memory_storage(text_bytes("0123456789"));
    Bytes read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({8}, read)), 2U);
    EXPECT_EQ(read, joined({text_bytes("89"), repeated(2, 0)}));
    read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({10}, read)), 0U);
    EXPECT_EQ(read, repeated(4, 0));
    read = repeated(4, 0xee);
    EXPECT_EQ(must(storage->read({~std::uint64_t{0}}, read)), 0U);
    EXPECT_EQ(read, repeated(4, 0));
}

TEST(MemoryStorage, WritesInPlace) {
    const auto storage = memory_storage(text_bytes("0123456789"));
    must(storage->write({3}, text_bytes("abc")));
    EXPECT_EQ(contents(*storage), text_bytes("012abc6789"));
}

TEST(MemoryStorage, GrowsByAWriteThatEndsPastTheEnd) {
    const auto storage = memory_storage(text_bytes("0123"));
    must(storage->write({3}, text_bytes("abc")));
    EXPECT_EQ(contents(*storage), text_bytes("012abc"));
    must(storage->write({8}, text_bytes("x")));
    EXPECT_EQ(contents(*storage), joined({text_bytes("012abc"), repeated(2, 0), text_bytes("x")}));
}

TEST(MemoryStorage, ZeroesWithoutGrowing) {
    const auto storage = memory_storage(text_bytes("0123456789"));
    must(storage->write_zeroes({2}, 3));
    EXPECT_EQ(contents(*storage), joined({text_bytes("01"), repeated(3, 0), text_bytes("56789")}));
    must(storage->write_zeroes({8}, 100));
    must(storage->write_zeroes({50}, 100));
    must(storage->write_zeroes({9}, ~std::uint64_t{0}));
    EXPECT_EQ(contents(*storage), joined({text_bytes("01"), repeated(3, 0), text_bytes("567"), repeated(2, 0)}));
}

TEST(MemoryStorage, ResizesWithZeros) {
    const auto storage = memory_storage(text_bytes("0123"));
    must(storage->resize(2));
    EXPECT_EQ(contents(*storage), text_bytes("01"));
    must(storage->resize(4));
    EXPECT_EQ(contents(*storage), joined({text_bytes("01"), repeated(2, 0)}));
}

TEST(MemoryStorage, RefusesASizeThatMemoryDoesNotHave) {
    const auto storage = memory_storage(text_bytes("0123"));
    EXPECT_TRUE(fails(storage->resize(~std::uint64_t{0}), Errc::no_space, {"memory: 18446744073709551615 bytes"}));
    EXPECT_TRUE(fails(storage->write({std::uint64_t{1} << 63}, text_bytes("x")), Errc::no_space));
    EXPECT_EQ(contents(*storage), text_bytes("0123"));
}

TEST(MemoryStorage, IsAllDataUpToTheEndAndAHolePastIt) {
    const auto storage = memory_storage(repeated(10, 0));
    const auto inside = must(storage->run({2}, 5));
    EXPECT_TRUE(inside.data);
    EXPECT_EQ(inside.length, 5U);
    const auto to_the_end = must(storage->run({2}, 100));
    EXPECT_TRUE(to_the_end.data);
    EXPECT_EQ(to_the_end.length, 8U);
    const auto past = must(storage->run({10}, 100));
    EXPECT_FALSE(past.data);
    EXPECT_EQ(past.length, 100U);
}

TEST(MemoryStorage, FlushesAndCopiesNothing) {
    const auto storage = memory_storage(repeated(10, 1));
    EXPECT_TRUE(storage->flush());
    EXPECT_EQ(must(storage->copy_from(*memory_storage(repeated(10, 2)), {0}, {0}, 10)), 0U);
    EXPECT_EQ(contents(*storage), repeated(10, 1));
}

TEST(MemoryStorage, GrowsUnderReadersAndWriters) {
    // Each thread writes and reads a part of its own while the others make the whole move.
    const auto storage = memory_storage();
    {
        std::vector<std::jthread> threads;
        for (std::uint8_t id = 1; id <= 4; ++id)
            threads.emplace_back([&storage, id] {
                for (std::uint64_t i = 0; i < 200; ++i) {
                    const HostOffset at{(i * 4 + id) * 512};
                    must(storage->write(at, repeated(512, id)));
                    Bytes read(512);
                    must(storage->read(at, read));
                    EXPECT_EQ(read, repeated(512, id));
                }
            });
    }
    EXPECT_EQ(must(storage->size()), (199 * 4 + 4 + 1) * 512U);
}

TEST(MemoryStorage, RefusesToWriteWhereOffsetsEnd) {
    const auto storage = memory_storage(text_bytes("abc"));
    EXPECT_TRUE(fails(storage->write({~std::uint64_t{0}}, text_bytes("xy")), Errc::no_space));
    EXPECT_EQ(must(storage->size()), 3U);
}

TEST(MemoryStorage, WritingNothingDoesNotGrow) {
    const auto storage = memory_storage(text_bytes("abc"));
    must(storage->write({10}, {}));
    EXPECT_EQ(must(storage->size()), 3U);
}

TEST(MemoryStorage, AReadSeesAWriteWholeOrNotAtAll) {
    const std::size_t size = 256 << 10;
    const auto storage = memory_storage(repeated(size, 'a'));
    std::atomic<bool> done = false;
    std::jthread writer([&] {
        for (int i = 0; i < 500; ++i) must(storage->write({0}, repeated(size, i % 2 == 0 ? 'b' : 'a')));
        done = true;
    });
    Bytes read(size);
    while (!done) {
        must(storage->read({0}, read));
        ASSERT_EQ(read, repeated(size, std::to_integer<unsigned char>(read.front())));
    }
}

TEST(MemoryStorage, IsCutWhileItIsWritten) {
    // With nothing to see but for a sanitizer: a write may not go past what is left.
    const auto storage = memory_storage();
    std::jthread cutter([&] {
        for (int i = 0; i < 2000; ++i) must(storage->resize(0));
    });
    for (int i = 0; i < 2000; ++i) must(storage->write({0}, repeated(4096, 'x')));
}

}  // namespace
}  // namespace qcow
