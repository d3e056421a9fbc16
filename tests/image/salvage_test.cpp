// What a copy saves of damaged images: everything that can be read, and nothing else is said to be lost.

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>

#include "base/buffers.h"
#include "fuzz/image_builder.h"
#include "hostile.h"
#include "qcow/concat.h"
#include "qcow/create.h"
#include "storage/pass_through.h"
#include "support/bytes.h"
#include "support/random.h"
#include "support/result.h"

namespace qcow::test {
namespace {

/// A file of which the system cannot read some sectors.
class BadSectors final : public PassThrough {
public:
    BadSectors(std::shared_ptr<Storage> inner, std::vector<std::uint64_t> sectors, Errc code = Errc::io)
        : PassThrough(std::move(inner)), sectors_(std::move(sectors)), code_(code) {}

    Result<std::size_t> read(HostOffset at, Buffers to) const override {
        for (const auto sector : sectors_) {
            if (sector * sector_bytes < at.value + to.size() && at.value < (sector + 1) * sector_bytes)
                return std::unexpected(Error{code_, name(), "cannot be read"});
        }
        return inner().read(at, to);
    }

private:
    std::vector<std::uint64_t> sectors_;
    Errc code_;
};

/// What single reads of each sector give.
struct Readable {
    Bytes contents;  // zeros where nothing can be read
    std::vector<bool> lost;
    std::uint64_t lost_bytes = 0;
    bool only_damage = true;  // the errors were of the kinds that a salvage passes over
};

Readable read_each_sector(Disk& disk) {
    Readable result;
    result.contents.resize(rounded_size(disk.size()));
    for (std::uint64_t at = 0; at < disk.size(); at += sector_bytes) {
        const auto sector =
            std::span(result.contents).subspan(at, std::min<std::uint64_t>(sector_bytes, disk.size() - at));
        auto read = disk.read({at}, sector);
        if (!read) read = disk.read({at}, sector);
        result.lost.push_back(!read);
        if (read) continue;
        std::ranges::fill(sector, std::byte{0});
        result.lost_bytes += sector.size();
        result.only_damage &= read.error().code == Errc::corrupt || read.error().code == Errc::io;
    }
    return result;
}

void expect_losses(const Losses& losses, const Readable& readable) {
    // But for parts of sectors, where a disk or its backing file ends in one.
    EXPECT_LE(losses.bytes, readable.lost_bytes + losses.ranges.size() * sector_bytes);
    EXPECT_GE(losses.bytes + losses.ranges.size() * sector_bytes, readable.lost_bytes);
    EXPECT_EQ(losses.unlisted_bytes, 0U);
    std::vector<bool> listed(readable.lost.size());
    std::uint64_t last_end = 0;
    for (const auto& [bytes, why] : losses.ranges) {
        ASSERT_GE(bytes.start.value, last_end);
        ASSERT_GT(bytes.length, 0U);
        ASSERT_FALSE(why.message().empty());
        last_end = bytes.start.value + bytes.length;
        for (auto at = bytes.start.value; at < last_end; ++at) listed[at / sector_bytes] = true;
    }
    EXPECT_TRUE(listed == readable.lost) << "other sectors are listed than those that cannot be read";
}

Bytes contents_of_disk(Disk& disk) {
    Bytes bytes(disk.size());
    must(disk.read({0}, bytes));
    return bytes;
}

std::shared_ptr<Image> raw_target(Bytes bytes) {
    return must(open_image(memory_storage(std::move(bytes)), {.writable = true, .format = Format::raw}));
}

/// Where a salvage goes.
struct Salvaged {
    std::string how;
    std::function<Result<Bytes>(Disk&, const CopyOptions&)> run;
};

Result<Bytes> as_new_image(Disk& source, const CopyOptions& copy, const CreateOptions& create, bool compress) {
    const NewImageFiles files{memory_storage(), nullptr};
    ConvertOptions convert;
    convert.copy = copy;
    convert.compress = compress;
    if (auto made = convert_image(source, files, create, convert); !made) return std::unexpected(made.error());
    const auto image = must(open_image(files.image));
    EXPECT_TRUE(must(image->check({})).clean());
    return contents_of_disk(*image);
}

std::vector<Salvaged> ways() {
    std::vector<Salvaged> result;
    result.push_back(
        {"into a raw disk full of other bytes", [](Disk& source, const CopyOptions& copy) -> Result<Bytes> {
             const auto target = raw_target(repeated(rounded_size(source.size()), 0xee));
             if (auto copied = copy_disk(source, *target, copy); !copied) return std::unexpected(copied.error());
             return contents_of_disk(*target);
         }});
    result.push_back({"every byte", [](Disk& source, CopyOptions copy) -> Result<Bytes> {
                          copy.sparse_bytes = 0;
                          const auto storage = memory_storage();
                          if (auto copied = convert_raw_image(source, storage, {}, copy); !copied)
                              return std::unexpected(copied.error());
                          Bytes bytes(must(storage->size()));
                          must(storage->read({0}, bytes));
                          return bytes;
                      }});
    result.push_back({"into a disk that has some of it", [](Disk& source, CopyOptions copy) -> Result<Bytes> {
                          copy.skip_equal = true;
                          const auto target = raw_target(repeated(rounded_size(source.size()), 0));
                          if (auto copied = copy_disk(source, *target, copy); !copied)
                              return std::unexpected(copied.error());
                          return contents_of_disk(*target);
                      }});
    result.push_back({"into a new image", [](Disk& source, const CopyOptions& copy) {
                          CreateOptions create;
                          create.cluster_size = 4096;
                          return as_new_image(source, copy, create, false);
                      }});
    result.push_back({"compressed", [](Disk& source, const CopyOptions& copy) {
                          CreateOptions create;
                          create.cluster_size = 512;
                          return as_new_image(source, copy, create, true);
                      }});
    return result;
}

/// Salvages in one way, with any number of threads.
void expect_saved(Disk& disk, const Readable& readable, const Salvaged& way, Random& random) {
    SCOPED_TRACE(way.how);
    Losses losses;
    CopyOptions copy;
    copy.workers = static_cast<unsigned>(random.between(1, 3));
    copy.salvage = &losses;
    const auto saved = way.run(disk, copy);
    ASSERT_TRUE(saved) << saved.error().message();
    EXPECT_TRUE(*saved == readable.contents) << "what was saved is not what can be read";
    expect_losses(losses, readable);
    if (readable.lost_bytes == 0) return;
    copy.salvage = nullptr;
    EXPECT_FALSE(way.run(disk, copy)) << "a copy that lost something succeeds";
}

/// The image and what it names, some of their sectors bad.
Result<std::shared_ptr<Image>> open_some(const std::vector<fuzz::SparseFile>& files, Random& random) {
    std::size_t next = 0;
    const auto open_next = [&]() -> Result<std::shared_ptr<Storage>> {
        if (next == files.size()) return std::unexpected(Error{Errc::not_found, "", "no such file"});
        auto storage = fuzz::storage_of(files[next++], "file");
        std::vector<std::uint64_t> bad;
        const auto sectors = must(storage->size()) / sector_bytes;
        // Not in the header, nor in holes, which take no sectors.
        while (sectors > 8 && random.chance(40)) {
            const auto sector = random.between(2, sectors - 1);
            if (must(storage->run({sector * sector_bytes}, 1)).data) bad.push_back(sector);
        }
        return std::make_shared<BadSectors>(std::move(storage), std::move(bad));
    };
    OpenOptions options;
    options.gate = [&](const FileReference&) { return open_next(); };
    return open_image(must(open_next()), options);
}

TEST(SalvageTest, WhatCanBeReadIsSavedAndTheRestIsListed) {
    const auto all_ways = ways();
    std::size_t damaged = 0;
    for (std::uint64_t round = 0; round < 150; ++round) {
        SCOPED_TRACE(testing::Message() << replay_hint() << ", round " << round);
        Random random(run_seed() * 1000 + round);
        fuzz::Random fuzz_random(run_seed() * 1000 + round);
        auto files = fuzz::build_image(fuzz_random);
        for (auto n = random.below(5); n > 0; --n) fuzz::damage(files, fuzz_random);
        const auto image = open_some(files, random);
        if (!image || (*image)->size() > 3 * MiB) continue;
        std::vector<std::shared_ptr<Disk>> disks = {*image};
        for (const auto* id : {"1", "2"}) {
            if (auto snapshot = (*image)->snapshots().open(id); snapshot && (*snapshot)->size() <= 3 * MiB)
                disks.push_back(*std::move(snapshot));
        }
        if (disks.size() > 1) disks.push_back(must(concatenate({disks.back(), disks.front()})));
        for (const auto& disk : disks) {
            const auto readable = read_each_sector(*disk);
            if (!readable.only_damage) continue;  // encrypted, or in a file that is not there
            damaged += readable.lost_bytes != 0 ? 1 : 0;
            expect_saved(*disk, readable, random.pick(all_ways), random);
        }
        if (testing::Test::HasFailure()) return;
    }
    EXPECT_GT(damaged, 5U) << "too little was damaged to show anything";
}

TEST(SalvageTest, OfDataOnlyTheBadSectorsAreLost) {
    const auto contents = Random(1).bytes(1 << 20);
    const auto bytes = std::as_bytes(std::span(contents));
    const auto storage = std::make_shared<BadSectors>(memory_storage({bytes.begin(), bytes.end()}),
                                                      std::vector<std::uint64_t>{7, 8, 9, 600, 2047});
    const auto disk = must(open_image(storage, {.format = Format::raw}));
    const auto readable = read_each_sector(*disk);
    ASSERT_EQ(readable.lost_bytes, 5 * sector_bytes);
    Random random(run_seed());
    for (const auto& way : ways()) expect_saved(*disk, readable, way, random);
    Losses losses;
    const auto target = raw_target(repeated(1 << 20, 0));
    must(copy_disk(*disk, *target, {.salvage = &losses}));
    ASSERT_EQ(losses.ranges.size(), 3U);
    EXPECT_EQ(losses.ranges[0].bytes.start.value, 7 * sector_bytes);
    EXPECT_EQ(losses.ranges[0].bytes.length, 3 * sector_bytes);
    EXPECT_EQ(losses.ranges[0].why.code, Errc::io);
}

TEST(SalvageTest, OfATableOnlyWhatABadSectorMapsIsLost) {
    const NewImageFiles files{memory_storage({}, "image"), nullptr};
    const auto source = must(open_image(memory_storage(repeated(1 << 20, 1)), {.format = Format::raw}));
    CreateOptions create;
    create.cluster_size = 4096;
    must(convert_image(*source, files, create));
    // Its L2 table lies behind its data; its fourth sector maps 64 clusters from 768 KiB on.
    std::array<std::byte, 8> word = {};
    must(files.image->read({40}, word));
    must(files.image->read({load_be<std::uint64_t>(word, 0)}, word));
    const auto table = load_be<std::uint64_t>(word, 0) & format::offset_mask;
    const auto disk = must(open_image(
        std::make_shared<BadSectors>(files.image, std::vector<std::uint64_t>{table / sector_bytes + 3}), {}));
    Losses losses;
    const auto target = raw_target(repeated(1 << 20, 2));
    must(copy_disk(*disk, *target, {.salvage = &losses}));
    ASSERT_EQ(losses.ranges.size(), 1U);
    EXPECT_EQ(losses.ranges[0].bytes.start.value, 768 * KiB);
    EXPECT_EQ(losses.ranges[0].bytes.length, 256 * KiB);
    EXPECT_EQ(losses.ranges[0].why.code, Errc::io);
    EXPECT_TRUE(contents_of_disk(*target) == joined({repeated(768 * KiB, 1), repeated(256 * KiB, 0)}));
}

TEST(SalvageTest, WhatFailsForAMomentIsNotLost) {
    class FailsEverySecondTime final : public PassThrough {
    public:
        using PassThrough::PassThrough;
        Result<std::size_t> read(HostOffset at, Buffers to) const override {
            if (count_++ % 2 == 0) return std::unexpected(Error{Errc::io, name(), "not now"});
            return inner().read(at, to);
        }

    private:
        mutable std::atomic<unsigned> count_ = 0;
    };
    const auto disk = must(open_image(std::make_shared<FailsEverySecondTime>(memory_storage(repeated(1 << 20, 1))),
                                      {.format = Format::raw}));
    Losses losses;
    const auto target = raw_target(repeated(1 << 20, 2));
    must(copy_disk(*disk, *target, {.workers = 1, .salvage = &losses}));
    EXPECT_EQ(losses.bytes, 0U);
    EXPECT_TRUE(contents_of_disk(*target) == repeated(1 << 20, 1));
}

TEST(SalvageTest, ARawDiskThatIsCutWhileItIsOpenIsNotZeros) {
    const auto storage = memory_storage(repeated(1 << 20, 1));
    const auto disk = must(open_image(storage, {.format = Format::raw}));
    must(storage->resize(700'000));
    const auto target = raw_target(repeated(1 << 20, 2));
    EXPECT_TRUE(fails(copy_disk(*disk, *target), Errc::io, {"1048576 bytes"}));
    Losses losses;
    must(copy_disk(*disk, *target, {.salvage = &losses}));
    EXPECT_EQ(losses.bytes, (1U << 20) - 700'000U);
    EXPECT_TRUE(contents_of_disk(*target) == joined({repeated(700'000, 1), repeated((1 << 20) - 700'000, 0)}));
}

TEST(SalvageTest, OnlyDamageIsPassedOver) {
    // A request that memory or a policy did not allow may succeed another time: zeros would be wrong.
    for (const auto code : {Errc::no_memory, Errc::refused_by_policy, Errc::not_found, Errc::encrypted}) {
        const auto storage =
            std::make_shared<BadSectors>(memory_storage(repeated(1 << 20, 1)), std::vector<std::uint64_t>{700}, code);
        const auto disk = must(open_image(storage, {.format = Format::raw}));
        Losses losses;
        const auto target = raw_target(repeated(1 << 20, 0));
        EXPECT_TRUE(fails(copy_disk(*disk, *target, {.salvage = &losses}), code));
    }
}

/// A disk of 1 TiB whose L1 table leads nowhere.
std::shared_ptr<Image> disk_without_tables(std::uint64_t l1_word) {
    hostile::HostileImage image(16);
    image.size = bit(40);
    image.l1_entries = 2048;
    image.fill(image.cluster(image.l1_table), image.l1_entries, l1_word);
    return must(hostile::open_bounded(image.finish()));
}

TEST(SalvageTest, ATebibyteWithoutTablesTakesNoTime) {
    for (const std::uint64_t word : {bit(63) | bit(50), std::uint64_t{0x1200}}) {
        const auto disk = disk_without_tables(word);
        Losses losses;
        const NewImageFiles files{memory_storage(), nullptr};
        ConvertOptions convert;
        convert.copy.salvage = &losses;
        const auto cost = hostile::cost_of([&] { must(convert_image(*disk, files, {}, convert)); });
        EXPECT_LT(cost.seconds, hostile::max_seconds);
        EXPECT_EQ(losses.bytes, bit(40));
        ASSERT_EQ(losses.ranges.size(), 1U);
        EXPECT_EQ(losses.ranges[0].bytes.length, bit(40));
        EXPECT_EQ(losses.ranges[0].why.code, Errc::corrupt);
    }
}

TEST(SalvageTest, TheListIsBounded) {
    // Every second sector is lost, by itself.
    class EverySecond final : public Disk {
    public:
        [[nodiscard]] std::uint64_t size() const override { return 4 * Losses::max_ranges * sector_bytes; }
        [[nodiscard]] std::uint64_t block_size() const override { return 512; }
        Result<void> do_read(GuestOffset at, Buffers to) override {
            const auto first = (at.value / sector_bytes + 1) / 2 * 2;
            if (first * sector_bytes < at.value + to.size()) {
                Error error{Errc::corrupt, "", "bad"};
                error.unreadable = {{first * sector_bytes}, sector_bytes};
                return std::unexpected(error);
            }
            scatter(repeated(to.size(), 1), to);
            return {};
        }
        Result<Extent> do_extent(GuestOffset at, std::uint64_t limit) override {
            return Extent{.start = at, .length = limit, .kind = Extent::Kind::data};
        }
    } disk;
    Losses losses;
    const auto target = raw_target(repeated(disk.size(), 0));
    must(copy_disk(disk, *target, {.salvage = &losses}));
    EXPECT_EQ(losses.bytes, disk.size() / 2);
    EXPECT_EQ(losses.ranges.size(), Losses::max_ranges);
    EXPECT_EQ(losses.unlisted_bytes, losses.bytes - Losses::max_ranges * sector_bytes);
}

TEST(SalvageTest, OverABackingFileThatIsDamagedItself) {
    // The source shows its damaged base; what can be read of both is left in the base, the rest is zeros on top of it.
    const auto contents = repeated(1 << 20, 7);
    const auto open_base = [&] {
        auto storage = std::make_shared<BadSectors>(memory_storage(contents), std::vector<std::uint64_t>{3, 1000});
        return must(open_image(std::move(storage), {.format = Format::raw}));
    };
    const NewImageFiles files{memory_storage({}, "top"), nullptr};
    CreateOptions create;
    create.backing_name = "base";
    create.backing_format = "raw";
    create.cluster_size = 4096;
    Losses losses;
    ConvertOptions convert;
    convert.copy.salvage = &losses;
    convert.backing = open_base();
    must(convert_image(*open_base(), files, create, convert));
    EXPECT_EQ(losses.bytes, 2 * sector_bytes);
    OpenOptions options;
    options.gate = [&](const FileReference&) -> Result<std::shared_ptr<Storage>> { return memory_storage(contents); };
    auto expected = contents;
    for (const auto sector : {3U, 1000U})
        std::ranges::fill(std::span(expected).subspan(sector * sector_bytes, sector_bytes), std::byte{0});
    EXPECT_TRUE(contents_of_disk(*must(open_image(files.image, options))) == expected);
}

}  // namespace
}  // namespace qcow::test
