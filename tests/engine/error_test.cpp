// What fails, or is found in a strange state, leaves nothing behind that later work stumbles over.

#include <gtest/gtest.h>

#include "base/bits.h"
#include "base/endian.h"
#include "engine/works.h"
#include "support/faulty.h"
#include "support/result.h"
#include "support/temporary_directory.h"

namespace qcow::test {
namespace {

using Operation = Faults::Operation;

struct Faulty {
    explicit Faulty(const ImageKind& kind, Random& random) : files(prepare(kind, random).files) {
        Files all;
        for (const auto& [name, file] : files) all[name] = std::make_shared<FaultyStorage>(file, faults);
        image = value_of(open_kind(kind, all, true));
    }

    Files files;
    std::shared_ptr<Faults> faults = std::make_shared<Faults>();
    std::shared_ptr<Image> image;
};

Bytes bytes_of(Disk& disk) {
    Bytes bytes(disk.size());
    value_of(disk.read({0}, bytes));
    return bytes;
}

void put(Bytes& expected, std::uint64_t at, const Bytes& bytes) {
    std::ranges::copy(bytes, expected.begin() + static_cast<std::ptrdiff_t>(at));
}

void expect_clean(const ImageKind& kind, const Files& files) {
    const auto report = value_of(value_of(open_kind(kind, files, false))->check({}));
    EXPECT_EQ(report.corruptions + report.errors, 0U) << report.findings.front().what;
}

/// A request whose entries lie in two pages of an L2 table, of which the second cannot be read.
TEST(ErrorTest, AWriteOfHalfItsEntries) {
    const auto kind = small("extended_16k", 8 * MiB);
    constexpr std::uint64_t at = 4 * MiB - 32 * KiB;  // a page has the entries of 4 MiB
    const Bytes ours(64 * KiB, std::byte{7});
    const Bytes others(64 * KiB, std::byte{9});
    for (std::uint64_t after = 0, hits = 1; hits != 0; ++after) {
        SCOPED_TRACE(after);
        auto random = Random::named("half");
        Faulty faulty(kind, random);
        faulty.faults->arm({Operation::read, after});
        static_cast<void>(faulty.image->write({at}, ours));
        hits = faulty.faults->hits();
        faulty.faults->disarm();
        value_of(faulty.image->write({at}, ours));
        value_of(faulty.image->flush());
        value_of(faulty.image->flush());
        auto expected = bytes_of(*faulty.image);
        for (std::uint64_t other = 0; other < 2 * MiB; other += others.size()) {
            value_of(faulty.image->write({other}, others));
            put(expected, other, others);
        }
        put(expected, at, ours);
        ASSERT_EQ(bytes_of(*faulty.image), expected);
        value_of(faulty.image->close());
        expect_clean(kind, faulty.files);
    }
}

/// Changes the size while an operation fails; whatever comes of that, what is said to be done afterwards is done.
void expect_sound_after_failed_resize(const ImageKind& kind, std::uint64_t size) {
    for (const auto operation : {Operation::read, Operation::write, Operation::space, Operation::flush}) {
        for (const unsigned percent : {0U, 100U}) {
            for (std::uint64_t after = 0, hits = 1; hits != 0; ++after) {
                SCOPED_TRACE(fmt::format("to {}: operation {} after {}, {}% done", size, static_cast<int>(operation),
                                         after, percent));
                auto random = Random::named("resize");
                Faulty faulty(kind, random);
                auto& image = *faulty.image;
                value_of(image.write({700 * KiB}, Bytes(64 * KiB, std::byte{5})));
                value_of(image.flush());
                auto expected = bytes_of(image);
                faulty.faults->arm({operation, after, 1, Errc::io, percent});
                static_cast<void>(image.resize(size, Image::Shrink::allow));
                hits = faulty.faults->hits();
                faulty.faults->disarm();
                expected.resize(image.size());
                ASSERT_EQ(bytes_of(image), expected);
                for (const std::uint64_t at : {12 * KiB, 500 * KiB, 900 * KiB}) {
                    if (at + 512 > image.size()) continue;
                    const Bytes bytes(512, std::byte{8});
                    if (image.write({at}, bytes)) put(expected, at, bytes);
                }
                if (image.size() > 720 * KiB && image.write_zeroes({710 * KiB}, 4 * KiB))
                    put(expected, 710 * KiB, Bytes(4 * KiB));
                ASSERT_EQ(bytes_of(image), expected);
                if (!image.flush()) continue;  // nothing more is promised
                faulty.image.reset();
                const auto again = value_of(open_kind(kind, faulty.files, false));
                ASSERT_EQ(bytes_of(*again), expected);
                expect_clean(kind, faulty.files);
            }
        }
    }
}

TEST(ErrorTest, AShrinkThatFails) { expect_sound_after_failed_resize(small("over_qcow2_longer_v3"), 32 * KiB); }
TEST(ErrorTest, AShrinkOfOwnClustersThatFails) { expect_sound_after_failed_resize(small("v3_4k"), 32 * KiB); }
TEST(ErrorTest, AGrowthOfTheL1TableThatFails) { expect_sound_after_failed_resize(small("v3_512"), 8 * MiB); }

TEST(ErrorTest, TwoResizesAtOnce) {
    const auto kind = small("v3_512", 64 * KiB);
    for (int round = 0; round < 20; ++round) {
        auto random = Random::named("resizes");
        const auto files = prepare(kind, random).files;
        const auto image = value_of(open_kind(kind, files, true));
        const auto written = stamped(0, 128, 1);
        in_threads(3, [&](unsigned t) {
            for (std::uint64_t i = 0; i < 128; ++i) {
                if (t == 2) {
                    value_of(image->write({i * 512}, std::span(written).subspan(i * 512, 512)));
                } else if (i % 8 == 0) {
                    // Whichever comes later may find the disk larger than it wants it.
                    static_cast<void>(image->resize(64 * KiB + (i + t + 1) * 32 * KiB));
                }
            }
        });
        value_of(image->close());
        auto found = bytes_of(*value_of(open_kind(kind, files, false)));
        ASSERT_TRUE(std::ranges::equal(written, std::span(found).first(written.size())));
        expect_clean(kind, files);
    }
}

/// The length of a file may be lost in a power loss: then a cluster that is kept for zeros can lie right behind its
/// end. The block that would count it may be nothing but a hole.
class BehindTheFile : public testing::Test {
protected:
    static constexpr std::uint64_t cluster = 4 * KiB;

    BehindTheFile() {
        auto random = Random::named("behind");
        files_ = prepare(kind_, random).files;
        auto& file = *files_.at(image_name);
        {
            const auto image = value_of(open_kind(kind_, files_, true));
            value_of(image->write({0}, Bytes(8 * cluster, std::byte{1})));
            value_of(image->close());
        }
        auto bytes = contents_of(file);
        const auto l1_table = load_be<std::uint64_t>(bytes, 40);
        const auto l2_table = load_be<std::uint64_t>(bytes, l1_table) & low_bits(56) & ~low_bits(9);
        block_ = load_be<std::uint64_t>(bytes, load_be<std::uint64_t>(bytes, 48));
        store_be<std::uint64_t>(bytes, l2_table + 9 * 8, bytes.size() | bit(63) | 1);
        bytes[79] |= std::byte{1};  // dirty
        value_of(file.write({0}, bytes));
    }

    void expect_not_handed_out() const {
        const auto image = value_of(open_kind(kind_, files_, true));
        value_of(image->write({10 * cluster}, Bytes(cluster, std::byte{10})));
        value_of(image->write({9 * cluster}, Bytes(cluster, std::byte{9})));
        value_of(image->flush());
        auto expected = Bytes(8 * cluster, std::byte{1});
        expected.resize(image->size());
        put(expected, 9 * cluster, Bytes(cluster, std::byte{9}));
        put(expected, 10 * cluster, Bytes(cluster, std::byte{10}));
        EXPECT_EQ(bytes_of(*image), expected);
        value_of(image->close());
        expect_clean(kind_, files_);
    }

    ImageKind kind_ = small("v3_4k");
    Files files_;
    std::uint64_t block_ = 0;
};

TEST_F(BehindTheFile, AClusterInUseIsNotHandedOut) { expect_not_handed_out(); }

TEST_F(BehindTheFile, NorWhereItsRefcountsWereAHole) {
    const TemporaryDirectory directory;
    save(files_, directory.path());
    files_[image_name] = value_of(open_file(directory / image_name, {.writable = true}));
    value_of(files_[image_name]->write_zeroes({block_}, cluster));
    expect_not_handed_out();
}

/// Refcounts of 64 bits may hold anything, and an image that was not closed says that they are not to be believed.
TEST(ErrorTest, RefcountsThatAreFarTooLargeAreCountedAnew) {
    auto kind = small("refcounts_64");
    auto random = Random::named("large");
    const auto files = prepare(kind, random).files;
    auto& file = *files.at(image_name);
    auto bytes = contents_of(file);
    const auto block = load_be<std::uint64_t>(bytes, load_be<std::uint64_t>(bytes, 48));
    for (std::uint64_t i = 0; i < 8; ++i) store_be(bytes, block + i * 8, ~std::uint64_t{0} >> i);
    bytes[79] |= std::byte{1};  // dirty
    value_of(file.write({0}, bytes));
    value_of(value_of(open_kind(kind, files, true))->close());
    const auto report = value_of(value_of(open_kind(kind, files, false))->check({}));
    EXPECT_TRUE(report.clean());
}

/// One flush at the end is enough, however much is changed.
TEST(ErrorTest, LargeRequestsAreWrittenThroughOnce) {
    const auto kind = small("writethrough");
    Files files{{image_name, memory_storage({}, image_name)}};
    auto create = kind.create;
    create.size = 64 * GiB;
    value_of(create_image({files[image_name], nullptr}, create));
    const auto faults = std::make_shared<Faults>();
    files[image_name] = std::make_shared<FaultyStorage>(files.at(image_name), faults);
    const auto image = value_of(open_kind(kind, files, true));
    faults->arm({Operation::flush, ~std::uint64_t{0}});
    value_of(image->write_zeroes({0}, 64 * GiB));
    value_of(image->discard({0}, 64 * GiB));
    value_of(image->resize(GiB, Image::Shrink::allow));
    EXPECT_LT(faults->count(Operation::flush), 80U);  // the zeros take 32,768 tables, which are reserved in runs
}

/// A refcount table may have entries for clusters that no offset can name.
TEST(ErrorTest, RefcountsBeyondAllFilesAreCorrupt) {
    const auto file = memory_storage({}, image_name);
    CreateOptions options;
    options.size = MiB;
    options.cluster_size = 2 * MiB;
    options.refcount_bits = 1;
    value_of(create_image({file, nullptr}, options));
    auto bytes = contents_of(*file);
    const std::uint64_t table = bytes.size();
    const std::uint64_t block = table + 8 * MiB;
    bytes.resize(block + 2 * MiB);
    store_be(bytes, table, load_be<std::uint64_t>(bytes, load_be<std::uint64_t>(bytes, 48)));
    store_be(bytes, table + (std::uint64_t{8} << 19), block);  // of clusters from 2^43, bytes from 2^64
    bytes[block] = std::byte{1};
    store_be(bytes, 48, table);
    store_be<std::uint32_t>(bytes, 56, 4);
    value_of(file->write({0}, bytes));
    EXPECT_TRUE(fails(open_image(file, {.writable = true, .format = Format::qcow2}), Errc::corrupt));
    EXPECT_EQ(contents_of(*file), bytes);
}

/// The only free cluster of a file goes to the block that would count it, and a larger table is needed for that; then
/// it goes on behind these.
TEST(ErrorTest, AFreeClusterThatTheTableTakes) {
    const auto kind = small("v3_512");
    auto random = Random::named("full");
    const auto files = prepare(kind, random).files;
    auto& file = *files.at(image_name);
    constexpr std::uint64_t blocks = 64;  // in a table of one cluster
    constexpr std::uint64_t counted = blocks * 256;
    auto bytes = contents_of(file);
    bytes.resize((counted + 1) * 512);
    const auto table = load_be<std::uint64_t>(bytes, 48);
    for (std::uint64_t i = 0; i < blocks; ++i) {
        auto block = load_be<std::uint64_t>(bytes, table + i * 8);
        if (block == 0) {
            block = (counted - blocks + i) * 512;
            store_be(bytes, table + i * 8, block);
        }
        for (std::uint64_t k = 0; k < 256; ++k) store_be<std::uint16_t>(bytes, block + k * 2, 1);
    }
    value_of(file.write({0}, bytes));

    const auto image = value_of(open_kind(kind, files, true));
    const Bytes written(4 * KiB, std::byte{3});
    value_of(image->write({8 * KiB}, written));
    value_of(image->close());
    Bytes expected(kind.create.size);
    put(expected, 8 * KiB, written);
    EXPECT_EQ(bytes_of(*value_of(open_kind(kind, files, false))), expected);
    expect_clean(kind, files);
}

/// A file during each of whose flushes somebody else does something.
class BusyStorage final : public PassThrough {
public:
    using PassThrough::PassThrough;

    Result<void> flush() override {
        if (std::this_thread::get_id() == whose && flushes++ < 200) std::thread(meanwhile).join();
        return inner().flush();
    }

    std::thread::id whose;
    unsigned flushes = 0;
    std::function<void()> meanwhile;
};

TEST(ErrorTest, AFlushDoesNotWaitForWhatOthersChangeMeanwhile) {
    const auto kind = small("over_raw_longer_v3", 2 * MiB);
    auto random = Random::named("busy");
    auto files = prepare(kind, random).files;
    const auto busy = std::make_shared<BusyStorage>(files.at(image_name));
    files[image_name] = busy;
    const auto image = value_of(open_kind(kind, files, true));
    std::uint64_t next = 0;
    const auto copy_on_write = [&] {
        value_of(image->write({next}, Bytes(512, std::byte{1})));
        next += 4 * KiB;
    };
    copy_on_write();
    busy->meanwhile = copy_on_write;
    busy->whose = std::this_thread::get_id();
    value_of(image->flush());
    EXPECT_LT(busy->flushes, 5U);
    busy->whose = {};
    value_of(image->close());
    expect_clean(kind, files);
}

}  // namespace
}  // namespace qcow::test
