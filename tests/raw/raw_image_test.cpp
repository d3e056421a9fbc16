#include "raw/raw_image.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/bits.h"
#include "base/try.h"
#include "storage/pass_through.h"
#include "support/bytes.h"
#include "support/faulty.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

/// Writes down what changes it, and may have a hole.
class Noted final : public PassThrough {
public:
    explicit Noted(std::uint64_t size) : PassThrough(memory_storage(Bytes(size), "disk.raw")) {}

    Result<void> write_zeroes(HostOffset at, std::uint64_t length) override {
        calls.push_back(fmt::format("zeroes {}+{}", at.value, length));
        return PassThrough::write_zeroes(at, length);
    }
    Result<void> allocate(HostOffset at, std::uint64_t length) override {
        calls.push_back(fmt::format("allocate {}+{}", at.value, length));
        return PassThrough::allocate(at, length);
    }
    Result<void> flush() override {
        calls.emplace_back("flush");
        return PassThrough::flush();
    }
    [[nodiscard]] Result<Run> run(HostOffset at, std::uint64_t limit) const override {
        if (at.value < hole_begin) return Run{true, std::min(limit, hole_begin - at.value)};
        if (at.value < hole_end) return Run{false, std::min(limit, hole_end - at.value)};
        return PassThrough::run(at, limit);
    }
    Result<std::uint64_t> copy_from(const Storage& source, HostOffset from, HostOffset to,
                                    std::uint64_t length) override {
        calls.push_back(fmt::format("copy {} {} to {}+{}", source.name(), from.value, to.value, length));
        return length / 2;
    }
    [[nodiscard]] Result<std::uint64_t> allocated() const override { return 4096; }

    std::vector<std::string> calls;
    std::uint64_t hole_begin = 0, hole_end = 0;
};

std::shared_ptr<Layer> open(std::shared_ptr<Storage> storage, std::optional<WriteOptions> write = {}) {
    PendingImage::Neighbours neighbours;
    neighbours.write = write;
    return must(must(raw::begin(std::move(storage)))->open(std::move(neighbours)));
}

TEST(RawImageTest, GuestOffsetsAreHostOffsets) {
    const auto storage = memory_storage(joined({repeated(512, 1), repeated(512, 2), repeated(100, 3)}), "disk.raw");
    const auto image = open(storage);
    EXPECT_EQ(image->size(), 1124U);
    EXPECT_EQ(image->format(), Format::raw);
    EXPECT_TRUE(is_aligned(image->block_size(), 512));
    EXPECT_THAT(image->files(), ElementsAre("disk.raw"));
    EXPECT_EQ(image->backing_file(), nullptr);
    Bytes read(612);
    must(image->read({512}, read));
    EXPECT_EQ(read, joined({repeated(512, 2), repeated(100, 3)}));
    const auto part = must(image->read_part({1000}, Buffers(read).first(124)));
    EXPECT_EQ(part.length, 124U);
    EXPECT_TRUE(part.held);
    EXPECT_EQ(first(read, 124), joined({repeated(24, 2), repeated(100, 3)}));
    EXPECT_TRUE(fails(image->read({513}, read), Errc::invalid_argument));
    must(image->read({1124}, {}));
}

TEST(RawImageTest, AnEmptyFileIsAnEmptyDisk) {
    const auto image = open(memory_storage());
    EXPECT_EQ(image->size(), 0U);
    must(image->read({0}, {}));
    EXPECT_TRUE(fails(image->extent({0}, 1), Errc::invalid_argument));
}

TEST(RawImageTest, ExtentsAreTheRunsOfTheFile) {
    const auto storage = std::make_shared<Noted>(10'000);
    storage->hole_begin = 4096;
    storage->hole_end = 8192;
    const auto image = open(storage);
    const auto expect = [&](std::uint64_t at, std::uint64_t limit, Extent::Kind kind, std::uint64_t length) {
        const auto extent = must(image->extent({at}, limit));
        EXPECT_EQ(extent.start, GuestOffset{at});
        EXPECT_EQ(extent.length, length);
        EXPECT_EQ(static_cast<int>(extent.kind), static_cast<int>(kind));
        EXPECT_EQ(extent.host, HostOffset{at});
        EXPECT_EQ(extent.storage, storage.get());
        EXPECT_EQ(extent.depth, 0U);
        EXPECT_FALSE(extent.compressed);
    };
    expect(0, ~std::uint64_t{0}, Extent::Kind::data, 4096);
    expect(100, 10, Extent::Kind::data, 10);
    expect(4096, 10'000, Extent::Kind::zero, 4096);
    expect(8191, 10'000, Extent::Kind::zero, 1);
    expect(8192, 10'000, Extent::Kind::data, 1808);
}

/// What the file had there is lost, and not zeros.
TEST(RawImageTest, WhatWasCutOffIsUnreadable) {
    const auto storage = memory_storage(repeated(8192, 1), "disk.raw");
    const auto image = open(storage);
    must(storage->resize(5000));
    EXPECT_EQ(image->size(), 8192U);
    Bytes read(4096);
    must(image->read({904}, read));
    EXPECT_EQ(read, repeated(4096, 1));
    const auto cut = image->read({1000}, read);
    EXPECT_TRUE(fails(cut, Errc::io, {"disk.raw", "0x1388", "8192 bytes"}));
    EXPECT_EQ(cut.error().unreadable.start, GuestOffset{5000});
    EXPECT_EQ(cut.error().unreadable.length, 96U);
    EXPECT_EQ(must(image->extent({0}, 8192)).length, 5000U);
    const auto extent = image->extent({6000}, 1000);
    EXPECT_TRUE(fails(extent, Errc::io, {"disk.raw", "0x1770"}));
    EXPECT_EQ(extent.error().unreadable.start, GuestOffset{6000});
    EXPECT_EQ(extent.error().unreadable.length, 1000U);
    EXPECT_EQ(must(image->info()).file_size, 5000U);
    EXPECT_EQ(must(image->info()).virtual_size, 8192U);
}

/// File systems tell a hole that reaches from there past the end.
TEST(RawImageTest, AHoleEndsWithTheFile) {
    const auto storage = std::make_shared<Noted>(8192);
    const auto image = open(storage);
    must(storage->resize(5000));
    storage->hole_begin = 4096;
    storage->hole_end = 8192;
    const auto hole = must(image->extent({4096}, 4096));
    EXPECT_EQ(hole.kind, Extent::Kind::zero);
    EXPECT_EQ(hole.length, 904U);
    EXPECT_TRUE(fails(image->extent({5000}, 1), Errc::io));
}

TEST(RawImageTest, WritesGoToTheirPlace) {
    const auto storage = memory_storage(Bytes(8192), "disk.raw");
    const auto image = open(storage, WriteOptions{});
    must(image->write({100}, repeated(50, 7)));
    Bytes read(200);
    must(storage->read({0}, read));
    EXPECT_EQ(read, with(Bytes(200), 100, repeated(50, 7)));
    EXPECT_TRUE(fails(image->write({8190}, repeated(3, 1)), Errc::invalid_argument));
    EXPECT_EQ(must(storage->size()), 8192U);
}

TEST(RawImageTest, ZerosAreKeptOnlyWhereThatIsAskedFor) {
    const auto storage = std::make_shared<Noted>(16'384);
    const auto image = open(storage, WriteOptions{});
    must(image->write({0}, repeated(16'384, 1)));
    must(image->write_zeroes({10}, 100));
    EXPECT_THAT(storage->calls, ElementsAre("zeroes 10+100"));
    storage->calls.clear();
    must(image->write_zeroes({200}, 300, Disk::Zeroes::keep));
    EXPECT_THAT(storage->calls, ElementsAre("zeroes 200+300", "allocate 200+300"));
    storage->calls.clear();
    must(image->discard({100}, 10'000));
    EXPECT_THAT(storage->calls, ElementsAre("zeroes 4096+4096"));
    Bytes read(16'384);
    must(image->read({0}, read));
    auto expected = repeated(16'384, 1);
    for (const auto& [at, length] : {std::pair{10, 100}, {200, 300}, {4096, 4096}})
        expected = with(expected, static_cast<std::size_t>(at), Bytes(static_cast<std::size_t>(length)));
    EXPECT_EQ(read, expected);
}

TEST(RawImageTest, TheDiskIsResizedWithItsFile) {
    const auto storage = memory_storage(repeated(4096, 1));
    const auto image = open(storage, WriteOptions{});
    must(image->resize(5120));
    EXPECT_EQ(image->size(), 5120U);
    EXPECT_EQ(must(storage->size()), 5120U);
    Bytes read(1024);
    must(image->read({4096}, read));
    EXPECT_EQ(read, Bytes(1024));
    EXPECT_TRUE(fails(image->resize(512), Errc::invalid_argument));
    EXPECT_EQ(image->size(), 5120U);
    must(image->resize(512, Image::Shrink::allow));
    EXPECT_EQ(image->size(), 512U);
    EXPECT_EQ(must(storage->size()), 512U);
}

TEST(RawImageTest, ADiskThatCannotBeResizedKeepsItsSize) {
    const auto faults = std::make_shared<Faults>();
    const auto image = open(std::make_shared<FaultyStorage>(memory_storage(Bytes(4096)), faults), WriteOptions{});
    faults->arm({.operation = Faults::Operation::space, .code = Errc::no_space});
    EXPECT_TRUE(fails(image->resize(8192), Errc::no_space));
    EXPECT_EQ(image->size(), 4096U);
}

TEST(RawImageTest, ErrorsOfTheFileArePassedOn) {
    const auto faults = std::make_shared<Faults>();
    const auto image = open(std::make_shared<FaultyStorage>(memory_storage(Bytes(8192)), faults), WriteOptions{});
    Bytes bytes(512);
    faults->arm({.operation = Faults::Operation::read});
    EXPECT_TRUE(fails(image->read({0}, bytes), Errc::io));
    faults->arm({.operation = Faults::Operation::write, .code = Errc::no_space});
    EXPECT_TRUE(fails(image->write({0}, bytes), Errc::no_space));
    faults->arm({.operation = Faults::Operation::space, .code = Errc::no_space});
    EXPECT_TRUE(fails(image->write_zeroes({0}, 512), Errc::no_space));
    faults->arm({.operation = Faults::Operation::space, .after = 1, .code = Errc::no_space});
    EXPECT_TRUE(fails(image->write_zeroes({0}, 512, Disk::Zeroes::keep), Errc::no_space));
    faults->arm({.operation = Faults::Operation::space, .code = Errc::no_space});
    EXPECT_TRUE(fails(image->discard({0}, 4096), Errc::no_space));
    faults->arm({.operation = Faults::Operation::flush});
    EXPECT_TRUE(fails(image->flush(), Errc::io));
}

TEST(RawImageTest, FlushesReachTheFile) {
    const auto storage = std::make_shared<Noted>(4096);
    must(open(storage, WriteOptions{})->flush());
    EXPECT_THAT(storage->calls, ElementsAre("flush"));
    storage->calls.clear();
    const auto unsafe = open(storage, WriteOptions{.cache = CacheMode::unsafe});
    must(unsafe->flush());
    must(unsafe->close());
    must(open(storage)->flush());
    EXPECT_THAT(storage->calls, IsEmpty()) << "nobody wants it, or nothing was written";
}

TEST(RawImageTest, AClosedDiskIsFlushedAndNotWrittenAnyMore) {
    const auto storage = std::make_shared<Noted>(4096);
    const auto image = open(storage, WriteOptions{});
    must(image->close());
    EXPECT_THAT(storage->calls, ElementsAre("flush"));
    EXPECT_TRUE(fails(image->write({0}, Bytes(512)), Errc::read_only, {"disk.raw"}));
    Bytes read(512);
    must(image->read({0}, read));
}

TEST(RawImageTest, ACloseThatCouldNotFlushMayBeTriedAgain) {
    const auto faults = std::make_shared<Faults>();
    const auto image = open(std::make_shared<FaultyStorage>(memory_storage(Bytes(4096)), faults), WriteOptions{});
    faults->arm({.operation = Faults::Operation::flush});
    EXPECT_TRUE(fails(image->close(), Errc::io));
    must(image->write({0}, Bytes(512)));
    must(image->close());
}

TEST(RawImageTest, TheKernelCopiesFromFileToFile) {
    const auto storage = std::make_shared<Noted>(8192);
    const auto source = memory_storage(Bytes(8192), "source");
    EXPECT_EQ(must(open(storage, WriteOptions{})->copy_from({4096}, *source, {512}, 4096)), 2048U);
    EXPECT_THAT(storage->calls, ElementsAre("copy source 512 to 4096+4096"));
    EXPECT_TRUE(fails(open(storage)->copy_from({0}, *source, {0}, 512), Errc::read_only));
}

TEST(RawImageTest, InfoTellsOfFileAndDisk) {
    const auto info = must(open(std::make_shared<Noted>(10'000))->info());
    EXPECT_EQ(info.filename, "disk.raw");
    EXPECT_EQ(info.format, Format::raw);
    EXPECT_EQ(info.virtual_size, 10'000U);
    EXPECT_EQ(info.file_size, 10'000U);
    EXPECT_EQ(info.disk_size, 4096U);
}

TEST(RawImageTest, WhatTheFormatHasNotIsAnError) {
    const auto image = open(memory_storage(Bytes(4096)), WriteOptions{});
    EXPECT_TRUE(fails(image->snapshots().open("1"), Errc::not_found));
    EXPECT_TRUE(fails(image->each_dirty("b", {0}, 1, [](const DirtyRun&) { return Result<void>(); }), Errc::not_found));
    EXPECT_TRUE(fails(image->check({}), Errc::unsupported));
    EXPECT_TRUE(fails(image->write_compressed({0}, Bytes(4096)), Errc::unsupported));
}

}  // namespace
}  // namespace qcow::test
