// Persistent bitmaps of images that are written: every change is in them, or they say that they cannot be trusted.

#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "base/bits.h"
#include "engine/bitmapped_image.h"
#include "engine/crash_states.h"
#include "engine/workload.h"
#include "interop/damaged_image.h"
#include "qcow/bitmaps.h"
#include "support/effort.h"
#include "support/faulty.h"
#include "support/recording.h"
#include "support/result.h"

namespace qcow::test {
namespace {

/// A kind of image with bitmaps, and some bits in them already.
struct Bitmapped {
    Files files;
    std::vector<BitmapModel> models;
    std::uint64_t size = 0;

    [[nodiscard]] BitmapModel& model(const std::string& name) {
        return *std::ranges::find(models, name, [](const auto& m) { return m.spec.name; });
    }

    void changed(std::uint64_t at, std::uint64_t length) {
        for (auto& model : models) {
            if (model.spec.enabled) model.set(at, length);
        }
    }
};

Bitmapped with_bitmaps(Files files, std::uint64_t size, Random& random, const std::vector<BitmapSpec>& specs) {
    Bitmapped result;
    result.files = std::move(files);
    result.size = size;
    with_files(result.files, [&](const auto& directory) {
        for (const auto& spec : specs) {
            add_bitmap({spec.name, spec.granularity}, directory);
            result.models.emplace_back(BitmapSpec{spec.name, spec.granularity}, result.size);
        }
        for (int i = 0; i < 2; ++i) {
            const auto sectors = result.size / sector_bytes;
            const auto at = random.below(sectors) * sector_bytes;
            const auto length = std::min(random.between(1, 300) * sector_bytes, result.size - at);
            must_qemu_io(image_name, "qcow2", {fmt::format("write -q -P 7 {} {}", at, length)}, directory);
            result.changed(at, length);
        }
        for (std::size_t i = 0; i < specs.size(); ++i) {
            if (specs[i].enabled) continue;
            must_qemu_img({"bitmap", "--disable", image_name, specs[i].name}, directory);
            result.models[i].spec.enabled = false;
        }
    });
    return result;
}

Bitmapped with_bitmaps(const ImageKind& kind, Random& random, const std::vector<BitmapSpec>& specs) {
    return with_bitmaps(prepare(kind, random).files, kind.create.size, random, specs);
}

const std::vector<BitmapSpec> some_bitmaps = {
    {"fine", 512}, {"frozen", 4 * KiB, false}, {"coarse", 64 * KiB}, {"one bit", 2048 * MiB}};

ImageKind small_kind(std::uint64_t size = 5 * MiB + 512, std::uint64_t cluster_size = 512) {
    ImageKind kind;
    kind.create.size = size;
    kind.create.cluster_size = cluster_size;
    return kind;
}

void expect_clean(Image& image) {
    const auto report = value_of(image.check({.workers = 1}));
    EXPECT_TRUE(report.clean()) << report.leaks << " leaks, " << report.corruptions << " corruptions; "
                                << (report.findings.empty() ? "" : report.findings[0].place + report.findings[0].what);
}

// ---- Random work on every kind of image ----

class BitmapTest : public testing::TestWithParam<ImageKind> {
protected:
    void change(Image& image) {
        const auto& open = GetParam().open.write;
        const auto block = image.block_size();
        auto at = random_.below(image.size());
        auto length = std::min(random_.between(1, random_.pick({std::uint64_t{600}, 3 * block, image.size() / 4})),
                               image.size() - at);
        switch (random_.below(5)) {
            case 0: value_of(image.write_zeroes({at}, length)); break;
            case 1: {
                value_of(image.discard({at}, length));
                if (!open.discard) return;
                // Whole blocks, the last one of the disk among them.
                const auto end = at + length == image.size() ? image.size() : (at + length) / block * block;
                at = (at + block - 1) / block * block;
                length = end > at ? end - at : 0;
                break;
            }
            case 2:
                if (!GetParam().can_compress()) return;
                at = at / block * block;
                length = std::min(2 * block, image.size() - at);
                value_of(image.write_compressed({at}, Bytes(length, std::byte{3})));
                break;
            default: {
                const auto text = random_.bytes(length);
                value_of(image.write({at}, std::as_bytes(std::span(text))));
            }
        }
        image_.changed(at, length);
    }

    void expect_bits(Image& image) {
        for (const auto& model : image_.models) {
            const auto difference = model.difference(bits_of(image, model.spec));
            ASSERT_FALSE(difference) << *difference;
            const auto at = random_.below(image.size());
            const auto length = random_.between(0, image.size() - at);
            BitmapModel part(model.spec, image.size());
            for (std::size_t i = 0; length != 0 && i < model.bits.size(); ++i) {
                const auto bit = i * model.spec.granularity;
                if (model.bits[i] && bit < at + length && bit + model.spec.granularity > at) part.bits[i] = true;
            }
            const auto found = length == 0 ? part.bits : bits_of(image, model.spec, at, length);
            ASSERT_FALSE(part.difference(found)) << *part.difference(found);
        }
    }

    /// QEMU finds the image sound, with the same flags and bits.
    void expect_qemu_agrees() {
        const TemporaryDirectory directory;
        save(image_.files, directory.path());
        const auto checked = qemu_img({"check", "-f", "qcow2", image_name}, directory.path());
        EXPECT_EQ(checked.status, 0) << checked.text();
        EXPECT_EQ(flags_in_qemu(directory.path()),
                  (std::set<std::string>{"coarse: auto", "fine: auto", "frozen: ", "one bit: auto"}));
        for (const auto& model : image_.models) {
            const auto difference = model.difference(bits_in_qemu(model.spec, image_.size, directory.path()));
            EXPECT_FALSE(difference) << "QEMU: " << *difference;
        }
    }

    Random random_ = Random::named(GetParam().name);
    Bitmapped image_;
};

TEST_P(BitmapTest, HasEveryChange) {
    SCOPED_TRACE(replay_hint());
    image_ = with_bitmaps(GetParam(), random_, some_bitmaps);
    for (unsigned session = 0; session < 3 * effort(); ++session) {
        const auto image = value_of(open_kind(GetParam(), image_.files, true));
        for (int i = 0; i < 10; ++i) change(*image);
        ASSERT_NO_FATAL_FAILURE(expect_bits(*image));
        expect_clean(*image);  // which saves them
        EXPECT_FALSE(bitmap_info(*image, "fine").in_use);
        ASSERT_NO_FATAL_FAILURE(expect_bits(*image));
        for (int i = 0; i < 3; ++i) change(*image);
        ASSERT_NO_FATAL_FAILURE(expect_bits(*image));
        value_of(image->close());
        ASSERT_NO_FATAL_FAILURE(expect_bits(*image));
    }
    const auto image = value_of(open_kind(GetParam(), image_.files, false));
    ASSERT_NO_FATAL_FAILURE(expect_bits(*image));
    expect_clean(*image);

    expect_qemu_agrees();
}

/// New bits are clean; a bit of which a part is left stays.
TEST_P(BitmapTest, FollowsTheSize) {
    SCOPED_TRACE(replay_hint());
    image_ = with_bitmaps(GetParam(), random_, some_bitmaps);
    for (unsigned session = 0; session < 3 * effort(); ++session) {
        const auto image = value_of(open_kind(GetParam(), image_.files, true));
        for (int i = 0; i < 4; ++i) {
            for (int k = 0; k < 2; ++k) change(*image);
            image_.size = random_.between(1, 20000) * sector_bytes;
            value_of(image->resize(image_.size, Image::Shrink::allow));
            for (auto& model : image_.models) {
                model.bits.resize((image_.size + model.spec.granularity - 1) / model.spec.granularity);
            }
            ASSERT_NO_FATAL_FAILURE(expect_bits(*image));
            if (random_.chance(30)) expect_clean(*image);
        }
        value_of(image->close());
        expect_clean(*value_of(open_kind(GetParam(), image_.files, false)));
    }
    expect_qemu_agrees();
}

std::vector<ImageKind> kinds_that_have_bitmaps() {
    auto kinds = image_kinds();
    // QEMU makes them, and would need the key.
    std::erase_if(kinds, [](const ImageKind& kind) { return kind.create.version < 3 || kind.encrypted(); });
    return kinds;
}

INSTANTIATE_TEST_SUITE_P(Kinds, BitmapTest, testing::ValuesIn(kinds_that_have_bitmaps()),
                         [](const auto& test) { return test.param.name; });

// ---- The marks ----

class BitmapMarksTest : public testing::Test {
protected:
    static std::shared_ptr<Image> open(const Files& files, bool writable = true) {
        return value_of(open_kind(small_kind(), files, writable));
    }

    static SoundImage bytes_of(const Files& files) {
        const auto bytes = contents_of(*files.at(image_name));
        return SoundImage({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    }

    void patch(std::uint64_t at, const Bytes& bytes) { value_of(image_.files.at(image_name)->write({at}, bytes)); }

    /// The first byte of the first bitmap.
    Result<void> read_fine() {
        return open(image_.files, false)->each_dirty("fine", {0}, 1, [](const auto&) { return Result<void>(); });
    }

    Random random_ = Random::named("marks");
    Bitmapped image_ = with_bitmaps(small_kind(), random_, some_bitmaps);
};

TEST_F(BitmapMarksTest, EnabledBitmapsAreInUseFromTheFirstChangeToTheClose) {
    const auto image = open(image_.files);
    value_of(image->write_zeroes({1000}, 1));
    const auto crashed = copy_of(image_.files);
    value_of(image->close());

    const auto found = open(crashed, false);
    for (const auto& model : image_.models) {
        EXPECT_EQ(bitmap_info(*found, model.spec.name).in_use, model.spec.enabled);
        if (model.spec.enabled) {
            EXPECT_TRUE(fails(found->each_dirty(model.spec.name, {0}, 1, [](const auto&) { return Result<void>(); }),
                              Errc::corrupt, {model.spec.name, "in use"}));
        } else {
            EXPECT_FALSE(model.difference(bits_of(*found, model.spec)));
        }
    }
    const TemporaryDirectory directory;
    save(crashed, directory.path());
    EXPECT_EQ(flags_in_qemu(directory.path()),
              (std::set<std::string>{"coarse: auto in-use", "fine: auto in-use", "frozen: ", "one bit: auto in-use"}));
    const auto& frozen = image_.model("frozen");
    EXPECT_FALSE(frozen.difference(bits_in_qemu(frozen.spec, image_.size, directory.path())));
}

TEST_F(BitmapMarksTest, TheNextChangeMarksThemAgain) {
    const auto image = open(image_.files);
    value_of(image->write_zeroes({0}, 1));
    expect_clean(*image);
    EXPECT_FALSE(bitmap_info(*image, "fine").in_use);
    value_of(image->write_zeroes({0}, 1));
    EXPECT_TRUE(bitmap_info(*image, "fine").in_use);
}

TEST_F(BitmapMarksTest, WithoutAChangeNothingIsWritten) {
    const auto before = contents_of(*image_.files.at(image_name));
    const auto image = open(image_.files);
    value_of(image->discard({1}, 100));
    EXPECT_FALSE(bitmap_info(*image, "fine").in_use);
    value_of(image->close());
    EXPECT_TRUE(contents_of(*image_.files.at(image_name)) == before);
}

TEST_F(BitmapMarksTest, TheDirectoryStaysAsItIs) {
    const auto before = bytes_of(image_.files);
    const auto image = open(image_.files);
    value_of(image->write_zeroes({0}, image->size()));
    value_of(image->close());
    const auto after = bytes_of(image_.files);
    const auto size = before.number(before.extension(0x23852875) + 8);
    EXPECT_EQ(after.bytes().substr(0, 512), before.bytes().substr(0, 512));
    EXPECT_EQ(after.bytes().substr(after.bitmap_directory(), size),
              before.bytes().substr(before.bitmap_directory(), size));
}

/// Whoever left it in use, its bits are not ours to complete.
TEST_F(BitmapMarksTest, WhatWasInUseStaysSo) {
    {
        const auto image = open(image_.files);
        value_of(image->write_zeroes({0}, 512));
        image_.files = copy_of(image_.files);
    }
    const auto image = open(image_.files);
    value_of(image->write_zeroes({0}, image->size()));
    value_of(image->close());
    EXPECT_TRUE(bitmap_info(*image, "fine").in_use);
    EXPECT_TRUE(bitmap_info(*image, "coarse").in_use);
    EXPECT_FALSE(image_.model("frozen").difference(bits_of(*image, image_.model("frozen").spec)));
}

/// A writer that knows no bitmaps has been there.
TEST_F(BitmapMarksTest, WhatIsOutOfDateIsLeftAlone) {
    patch(88, u64(0));
    const auto before = bytes_of(image_.files);
    const auto image = open(image_.files);
    value_of(image->write_zeroes({0}, image->size()));
    EXPECT_TRUE(fails(read_fine(), Errc::not_found, {"up to date"}));
    value_of(image->close());
    const auto after = bytes_of(image_.files);
    const auto size = before.number(before.extension(0x23852875) + 8);
    EXPECT_EQ(after.bytes().substr(after.bitmap_directory(), size),
              before.bytes().substr(before.bitmap_directory(), size));
    EXPECT_TRUE(value_of(image->info()).bitmaps_stale);
}

TEST_F(BitmapMarksTest, AClusterOfOnesStaysOne) {
    // The first bitmap: bits for 2 MiB a table entry.
    const auto table = bytes_of(image_.files).number(bytes_of(image_.files).bitmap_directory());
    patch(table, u64(1));
    patch(table + 8, u64(0));
    auto& fine = image_.model("fine");
    fine.set(0, 2 * MiB);
    std::fill_n(fine.bits.begin() + 4096, 4096, false);
    fine.set(2 * MiB + 100, 5000);
    const auto image = open(image_.files);
    value_of(image->write_zeroes({512}, 100 * KiB));
    value_of(image->write_zeroes({2 * MiB + 100}, 5000));
    EXPECT_FALSE(fine.difference(bits_of(*image, fine.spec)));
    value_of(image->close());
    EXPECT_EQ(bytes_of(image_.files).number(table), 1U);
    EXPECT_FALSE(fine.difference(bits_of(*open(image_.files, false), fine.spec)));
}

TEST_F(BitmapMarksTest, DamagedTablesAreNeverTrusted) {
    const auto table = bytes_of(image_.files).number(bytes_of(image_.files).bitmap_directory());
    patch(table, u64(2));
    EXPECT_TRUE(fails(read_fine(), Errc::corrupt, {"\"fine\"", "table entry 0", "reserved"}));
    const auto image = open(image_.files);
    value_of(image->write_zeroes({0}, 512));
    EXPECT_TRUE(fails(image->close(), Errc::corrupt, {"\"fine\"", "reserved"}));
    EXPECT_TRUE(bitmap_info(*image, "fine").in_use);
}

TEST_F(BitmapMarksTest, ATableOfAnotherSizeIsInUseForGood) {
    patch(bytes_of(image_.files).bitmap_directory() + 8, u32(1));
    EXPECT_TRUE(fails(read_fine(), Errc::corrupt, {"\"fine\"", "1 entries"}));
    const auto image = open(image_.files);
    value_of(image->write_zeroes({0}, 512));
    value_of(image->close());
    EXPECT_TRUE(bitmap_info(*image, "fine").in_use);
    EXPECT_FALSE(bitmap_info(*image, "coarse").in_use);
}

/// The first letter of the name becomes extra data.
TEST_F(BitmapMarksTest, WithExtraDataItIsKeptOnlyIfItMayBe) {
    const auto entry = bytes_of(image_.files).bitmap_directory();
    patch(entry + 18, u16(3));
    patch(entry + 20, u32(1));
    const auto before = image_.files;
    for (const bool may : {false, true}) {
        image_.files = copy_of(before);
        patch(entry + 12, u32(may ? 6 : 2));
        const auto image = open(image_.files);
        const auto found = image->each_dirty("ine", {0}, 1, [](const auto&) { return Result<void>(); });
        EXPECT_TRUE(may ? testing::AssertionResult(found.has_value()) : fails(found, Errc::unsupported, {"\"ine\""}));
        value_of(image->write_zeroes({0}, 512));
        value_of(image->close());
        EXPECT_EQ(bitmap_info(*image, "ine").in_use, !may);
        EXPECT_EQ(bytes_of(image_.files).number(entry + 12, 4), may ? 6U : 3U);
    }
}

TEST_F(BitmapMarksTest, WhatDoesNotFitIntoMemoryIsInUseForGood) {
    auto kind = small_kind(20 * KiB * MiB, 64 * KiB);
    kind.open.cache_bytes = 1;
    Files files{{image_name, memory_storage({}, image_name)}};
    value_of(create_image({files.at(image_name), nullptr}, kind.create));
    // 5, 1.25, 2.5, 1.25 MiB and 2.5 KiB of bits, where there is room for 4 MiB.
    auto image = with_bitmaps(
        std::move(files), kind.create.size, random_,
        {{"too large", 512}, {"fits", 2 * KiB}, {"also fits", KiB}, {"no longer", 2 * KiB}, {"tiny", MiB}});
    const auto opened = value_of(open_kind(kind, image.files, true));
    // Whoever asks before the first change is told something else after it.
    value_of(opened->each_dirty("too large", {0}, 1, [](const auto&) { return Result<void>(); }));
    value_of(opened->write_zeroes({0}, 10 * KiB * MiB));
    EXPECT_TRUE(fails(opened->each_dirty("too large", {0}, 1, [](const auto&) { return Result<void>(); }),
                      Errc::corrupt, {"in use"}));
    value_of(opened->close());
    image.changed(0, 10 * KiB * MiB);
    EXPECT_TRUE(bitmap_info(*opened, "too large").in_use);
    EXPECT_TRUE(bitmap_info(*opened, "no longer").in_use);
    for (const auto* name : {"fits", "also fits", "tiny"}) {
        EXPECT_FALSE(bitmap_info(*opened, name).in_use) << name;
        EXPECT_FALSE(image.model(name).difference(bits_of(*opened, image.model(name).spec)));
    }
    expect_clean(*opened);
}

TEST_F(BitmapMarksTest, ThereMustBeSuchABitmap) {
    const auto ignore = [](const auto&) { return Result<void>(); };
    const auto image = open(image_.files, false);
    EXPECT_TRUE(fails(image->each_dirty("nobody's", {0}, 1, ignore), Errc::not_found, {"\"nobody's\""}));
    EXPECT_TRUE(fails(image->each_dirty("fine", {1}, image->size(), ignore), Errc::invalid_argument));
    EXPECT_TRUE(image->each_dirty("fine", {image->size()}, 0, ignore));
    EXPECT_TRUE(fails(raw_disk(Bytes(512))->each_dirty("fine", {0}, 1, ignore), Errc::not_found));
}

TEST_F(BitmapMarksTest, AnErrorOfTheVisitorEndsTheVisit) {
    const auto image = open(image_.files, false);
    int visits = 0;
    const auto stop = [&](const auto&) -> Result<void> {
        ++visits;
        return std::unexpected(Error{Errc::invalid_argument, "here", "enough"});
    };
    EXPECT_TRUE(fails(image->each_dirty("fine", {0}, image->size(), stop), Errc::invalid_argument, {"enough"}));
    EXPECT_EQ(visits, 1);
}

TEST_F(BitmapMarksTest, ThreadsRecordTogether) {
    const auto image = open(image_.files);
    in_threads(4, [&](unsigned t) {
        Random random(t);
        for (int i = 0; i < 200; ++i) {
            // Neighbouring bits, so that the threads share words.
            const auto at = (random.below(image->size() / 2048) * 4 + t) * 512;
            value_of(image->write({at}, Bytes(512, std::byte{1})));
            if (i % 50 == 0) bits_of(*image, {"fine", 512});
        }
    });
    for (unsigned t = 0; t < 4; ++t) {
        Random random(t);
        for (int i = 0; i < 200; ++i) image_.changed((random.below(image_.size / 2048) * 4 + t) * 512, 512);
    }
    value_of(image->close());
    for (const auto& model : image_.models) EXPECT_FALSE(model.difference(bits_of(*image, model.spec)));
}

// ---- Power losses and errors ----

/// What is wrong with the bitmaps of files that somebody stopped writing: in those that are not in use there must be
/// all that is dirty from the beginning, and whatever has changed since. `contents`: what was there at first, as far as
/// it has always been part of the disk.
std::optional<std::string> wrong_bits(const ImageKind& kind, const Files& files, const Bitmapped& before,
                                      const Bytes& contents) {
    const auto image = value_of(open_kind(kind, files, false));
    const bool resized = contents.size() < before.size;
    Bytes now(contents.size());
    value_of(image->read({0}, now));
    if (const auto report = value_of(image->check({.workers = 1})); report.corruptions + report.errors != 0)
        return report.findings.front().place + ": " + report.findings.front().what;
    for (const auto& found : value_of(image->info()).bitmaps) {
        if (found.name != "copy") continue;
        BitmapModel copy({"copy", 4 * KiB}, image->size());
        for (const auto& model : before.models) {
            if (model.spec.name == "frozen") copy.bits = model.bits;
        }
        if (found.enabled || found.in_use) return "the copy is not as it was added";
        if (auto difference = copy.difference(bits_of(*image, copy.spec))) return difference;
    }
    for (const auto& model : before.models) {
        if (bitmap_info(*image, model.spec.name).in_use) {
            if (!model.spec.enabled && !resized) return "a disabled bitmap is in use";
            continue;
        }
        const auto bits = bits_of(*image, model.spec);
        for (std::size_t i = 0; i * model.spec.granularity < now.size(); ++i) {
            const auto at = i * model.spec.granularity;
            const auto length = std::min<std::uint64_t>(model.spec.granularity, now.size() - at);
            const bool changed = model.spec.enabled && std::memcmp(now.data() + at, contents.data() + at, length) != 0;
            if (bits[i] < (model.bits[i] || changed))
                return fmt::format("bitmap \"{}\" is not in use, and bit {} is clean", model.spec.name, i);
            if (!model.spec.enabled && bits[i] != model.bits[i]) return "a disabled bitmap has changed";
        }
    }
    return std::nullopt;
}

Bytes contents_of_disk(const ImageKind& kind, const Files& files) {
    const auto image = value_of(open_kind(kind, files, false));
    Bytes bytes(image->size());
    value_of(image->read({0}, bytes));
    return bytes;
}

/// Some writes, saved twice on the way. Ends where something fails.
Result<void> work(Image& image, Random& random) {
    for (int i = 0; i < 12; ++i) {
        const auto at = random.below(image.size() / sector_bytes) * sector_bytes;
        const auto length = std::min(random.between(1, 20) * sector_bytes, image.size() - at);
        const Bytes bytes(length, static_cast<std::byte>(random.between(1, 255)));
        if (auto wrote = image.write({at}, bytes); !wrote) return wrote;
        if (i % 5 == 3) {
            if (auto flushed = image.flush(); !flushed) return flushed;
        }
        if (i % 5 == 4) {
            if (auto checked = image.check({.workers = 1}); !checked) return std::unexpected(checked.error());
        }
    }
    return image.close();
}

/// The same between changes of the size, to this one at least.
constexpr std::uint64_t smallest_size = 300 * KiB;
Result<void> work_and_resize(Image& image, Random& random) {
    for (const std::uint64_t size : {3 * MiB + 512, smallest_size, 1 * MiB, 9 * MiB, 700 * KiB}) {
        const Bytes bytes(random.between(1, 20) * sector_bytes, static_cast<std::byte>(random.between(1, 255)));
        const auto at = random.below((image.size() - bytes.size()) / sector_bytes) * sector_bytes;
        if (auto wrote = image.write({at}, bytes); !wrote) return wrote;
        if (auto resized = image.resize(size, Image::Shrink::allow); !resized) return resized;
    }
    return image.close();
}

/// The same between changes of the bitmaps. "copy" is there with all the bits of "frozen", or it is not there.
Result<void> work_and_change_bitmaps(Image& image, Random& random) {
    using enum BitmapAction::Kind;
    const BitmapAction add_copy{.kind = add, .bitmap = "copy", .granularity = 4 * KiB};
    const BitmapAction freeze_copy{.kind = disable, .bitmap = "copy"};
    const BitmapAction merge_frozen{.kind = merge, .bitmap = "copy", .source = "frozen"};
    const BitmapAction add_other{.kind = add, .bitmap = "other", .granularity = 512};
    const BitmapAction merge_fine{.kind = merge, .bitmap = "other", .source = "fine"};
    const BitmapAction clear_other{.kind = clear, .bitmap = "other"};
    const BitmapAction remove_copy{.kind = remove, .bitmap = "copy"};
    const BitmapAction remove_other{.kind = remove, .bitmap = "other"};
    const std::vector<std::vector<BitmapAction>> steps = {{add_copy, freeze_copy, merge_frozen},
                                                          {add_other},
                                                          {merge_fine},
                                                          {remove_copy, clear_other},
                                                          {add_copy, freeze_copy, merge_frozen},
                                                          {remove_other, remove_copy}};
    for (const auto& step : steps) {
        for (int i = 0; i < 2; ++i) {
            const Bytes bytes(random.between(1, 20) * sector_bytes, static_cast<std::byte>(random.between(1, 255)));
            const auto at = random.below((image.size() - bytes.size()) / sector_bytes) * sector_bytes;
            if (auto wrote = image.write({at}, bytes); !wrote) return wrote;
        }
        if (auto changed = image.change_bitmaps(step); !changed) return changed;
    }
    return image.close();
}

using Job = Result<void> (*)(Image&, Random&);

struct CrashedBits {
    unsigned states = 0;
    unsigned trusted = 0;  ///< of those
    std::optional<std::string> wrong;
};

/// Power losses at every moment of the work; `left_out`: whether a flush did nothing, given by when it began and ended.
using LeftOut = std::function<bool(const StorageLog& log, std::size_t begun, std::size_t ended)>;
CrashedBits crash(const ImageKind& kind, Random& random, const LeftOut& left_out = {}, Job worker = work) {
    const auto prepared = with_bitmaps(kind, random, {{"fine", 512}, {"frozen", 4 * KiB, false}, {"coarse", 64 * KiB}});
    auto contents = contents_of_disk(kind, prepared.files);
    if (worker == work_and_resize) contents.resize(smallest_size);
    const auto before = copy_of(prepared.files);
    StorageLog log;
    Files recorded;
    for (const auto& [name, file] : prepared.files)
        recorded[name] = std::make_shared<RecordingStorage>(file, name, log);
    value_of(worker(*value_of(open_kind(kind, recorded, true)), random));

    const auto shown = log.without_flushes(
        [&](std::size_t ended) { return left_out && left_out(log, log.events()[ended].begun, ended); });
    CrashStates states(shown, before);
    CrashedBits result;
    // Under sanitizers one moment in four, unless a mistake is to be found.
    const std::size_t step = sanitized && !left_out ? 4 : 1;
    for (std::size_t now = 1; now <= shown.events().size() && !result.wrong; now += step) {
        states.advance(now);
        for (const unsigned percent : {0U, 50U, 50U, 100U}) {
            const auto files = states.build([&](std::size_t, std::uint64_t) { return random.chance(percent); });
            result.wrong = wrong_bits(kind, files, prepared, contents);
            if (result.wrong) break;
            ++result.states;
            result.trusted += bitmap_info(*value_of(open_kind(kind, files, false)), "fine").in_use ? 0 : 1;
        }
    }
    return result;
}

TEST(BitmapCrashTest, ABitmapIsRightOrInUse) {
    unsigned states = 0;
    unsigned trusted = 0;
    for (const auto& kind : {small_kind(MiB + 512, 512), small_kind(MiB, 64 * KiB)}) {
        for (unsigned i = 0; i < 2 * effort(); ++i) {
            auto random = Random::named(fmt::format("bitmaps/{}", i));
            const auto result = crash(kind, random);
            ASSERT_FALSE(result.wrong) << *result.wrong << "\n" << replay_hint();
            states += result.states;
            trusted += result.trusted;
        }
    }
    EXPECT_GT(trusted, 0U);
    EXPECT_LT(trusted, states);
    std::cout << "covered " << states << " states after power loss, in " << trusted << " of them the bits were valid\n";
}

TEST(BitmapCrashTest, ABitmapIsRightOrInUseWhileTheSizeChanges) {
    unsigned states = 0;
    unsigned trusted = 0;
    for (const auto& kind : {small_kind(MiB + 512, 512), small_kind(MiB, 64 * KiB)}) {
        auto random = Random::named(fmt::format("resized bitmaps/{}", kind.create.cluster_size));
        const auto result = crash(kind, random, {}, work_and_resize);
        ASSERT_FALSE(result.wrong) << *result.wrong << "\n" << replay_hint();
        states += result.states;
        trusted += result.trusted;
    }
    EXPECT_GT(trusted, 0U);
    std::cout << "covered " << states << " states after power loss, in " << trusted << " of them the bits were valid\n";
}

TEST(BitmapCrashTest, ABitmapIsRightOrInUseWhileOthersComeAndGo) {
    unsigned states = 0;
    unsigned trusted = 0;
    for (const auto& kind : {small_kind(MiB + 512, 512), small_kind(MiB, 64 * KiB)}) {
        auto random = Random::named(fmt::format("changed bitmaps/{}", kind.create.cluster_size));
        const auto result = crash(kind, random, {}, work_and_change_bitmaps);
        ASSERT_FALSE(result.wrong) << *result.wrong << "\n" << replay_hint();
        states += result.states;
        trusted += result.trusted;
    }
    EXPECT_GT(trusted, 0U);
    std::cout << "covered " << states << " states after power loss, in " << trusted << " of them the bits were valid\n";
}

TEST(BitmapCrashTest, ADirectoryThatIsNotFlushedIsFound) {
    Random random(1);
    const auto before_header = [](const StorageLog& log, std::size_t, std::size_t ended) {
        return ended + 1 < log.events().size() && log.events()[ended + 1].kind == StorageEvent::Kind::write &&
               log.events()[ended + 1].at == 0;
    };
    EXPECT_TRUE(crash(small_kind(MiB), random, before_header, work_and_change_bitmaps).wrong);
}

/// Of all that is written, flags are the only thing of four bytes, where the size does not change.
bool changes_flags(const StorageEvent& event) {
    return event.kind == StorageEvent::Kind::write && event.bytes.size() == 4;
}

TEST(BitmapCrashTest, MarksThatAreNotFlushedAreFound) {
    Random random(1);
    const auto after_marks = [](const StorageLog& log, std::size_t begun, std::size_t) {
        return changes_flags(log.events()[begun - 1]);
    };
    // Large clusters: after the first few, writes need no new ones, and so no flush of their own.
    EXPECT_TRUE(crash(small_kind(MiB, 64 * KiB), random, after_marks).wrong);
}

TEST(BitmapCrashTest, BitsThatAreNotFlushedAreFound) {
    Random random(1);
    const auto before_marks = [](const StorageLog& log, std::size_t, std::size_t ended) {
        return ended + 1 < log.events().size() && changes_flags(log.events()[ended + 1]);
    };
    EXPECT_TRUE(crash(small_kind(MiB), random, before_marks).wrong);
}

/// Each write and each flush in turn fails, once or for good.
TEST(BitmapFaultTest, ABitmapIsRightOrInUse) {
    const auto kind = small_kind(MiB, 4 * KiB);
    auto random = Random::named("bitmap faults");
    const auto prepared = with_bitmaps(kind, random, {{"fine", 512}, {"frozen", 4 * KiB, false}, {"coarse", 64 * KiB}});
    const auto contents = contents_of_disk(kind, prepared.files);
    auto always_there = contents;
    always_there.resize(smallest_size);
    unsigned faults = 0;
    for (const auto worker : {work, work_and_resize, work_and_change_bitmaps}) {
        for (const auto operation : {Faults::Operation::write, Faults::Operation::space, Faults::Operation::flush}) {
            for (const auto times : {std::uint64_t{1}, ~std::uint64_t{0}}) {
                for (std::uint64_t after = 0;; ++after) {
                    SCOPED_TRACE(
                        fmt::format("operation {}, {} times after {}", static_cast<int>(operation), times, after));
                    auto files = copy_of(prepared.files);
                    const auto injected = std::make_shared<Faults>();
                    {
                        Files faulty;
                        for (const auto& [name, file] : files)
                            faulty[name] = std::make_shared<FaultyStorage>(file, injected);
                        const auto image = value_of(open_kind(kind, faulty, true));
                        injected->arm({operation, after, times, Errc::no_space});
                        Random same(7);
                        static_cast<void>(worker(*image, same));
                    }
                    const auto wrong =
                        wrong_bits(kind, files, prepared, worker == work_and_resize ? always_there : contents);
                    ASSERT_FALSE(wrong) << *wrong;
                    if (injected->hits() == 0) break;
                    ++faults;
                }
            }
        }
    }
    std::cout << "covered " << faults << " faults\n";
}

/// Bits have space in the file before what they are about changes. So a full file system cannot keep them from being
/// saved.
TEST(BitmapFaultTest, SavingNeedsNoSpace) {
    const auto kind = small_kind(20 * MiB, 512);
    auto random = Random::named("bitmap space");
    auto files = prepare(kind, random).files;
    with_files(files, [](const auto& directory) { add_bitmap({"fine", 512}, directory); });
    const auto faults = std::make_shared<Faults>();
    const auto file = std::make_shared<FaultyStorage>(files.at(image_name), faults);
    const auto image = value_of(open_kind(kind, {{image_name, file}}, true));
    value_of(image->write_zeroes({0}, image->size() / 2));
    faults->set_room(value_of(file->size()));
    EXPECT_TRUE(fails(image->write_zeroes({0}, image->size()), Errc::no_space));
    expect_clean(*image);
    EXPECT_FALSE(bitmap_info(*image, "fine").in_use);
    const auto bits = bits_of(*image, {"fine", 512}, 0, image->size() / 2);
    EXPECT_EQ(static_cast<std::uint64_t>(std::ranges::count(bits, true)), image->size() / 2 / 512);
    faults->set_room({});
    value_of(image->write_zeroes({0}, image->size()));
    expect_clean(*image);
    BitmapModel all({"fine", 512}, image->size());
    all.set(0, image->size());
    EXPECT_FALSE(all.difference(bits_of(*image, all.spec)));
}

}  // namespace
}  // namespace qcow::test
