// Bitmaps that are added, removed, cleared, enabled, disabled and merged, as qemu-img bitmap does it.

#include <gtest/gtest.h>

#include <array>
#include <atomic>
#include <map>
#include <thread>

#include "base/bits.h"
#include "engine/bitmapped_image.h"
#include "qcow/bitmaps.h"
#include "support/disks.h"
#include "support/effort.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using Kind = BitmapAction::Kind;

std::vector<ImageKind> kinds_of_version_3() {
    auto kinds = image_kinds();
    // QEMU looks at them, and would need the key.
    std::erase_if(kinds, [](const ImageKind& kind) { return kind.create.version < 3 || kind.encrypted(); });
    return kinds;
}

void expect_sound(Image& image) {
    const auto report = value_of(image.check({.workers = 1}));
    EXPECT_TRUE(report.clean()) << (report.findings.empty() ? "leaks" : report.findings[0].what);
}

class BitmapChangesTest : public testing::TestWithParam<ImageKind> {
protected:
    using Models = std::map<std::string, BitmapModel>;

    [[nodiscard]] std::string any_name() { return names_[random_.below(names_.size())]; }

    /// An action that works on these bitmaps, if the dice find one.
    std::optional<BitmapAction> any_action(const Models& models) {
        BitmapAction action{.kind = static_cast<Kind>(random_.below(6)), .bitmap = any_name()};
        const bool exists = models.contains(action.bitmap);
        if (exists == (action.kind == Kind::add)) return std::nullopt;
        if (action.kind == Kind::add) action.granularity = random_.pick({0U, 512U, 1024U, 65536U, 1U << 20});
        if (action.kind == Kind::merge) {
            action.source = any_name();
            if (!models.contains(action.source)) return std::nullopt;
        }
        return action;
    }

    [[nodiscard]] Models after(Models models, const BitmapAction& action, std::uint64_t size) const {
        const auto found = models.find(action.bitmap);
        switch (action.kind) {
            case Kind::add: {
                auto granularity = action.granularity;
                if (granularity == 0) granularity = std::clamp(GetParam().create.cluster_size, 4 * KiB, 64 * KiB);
                models.emplace(action.bitmap, BitmapModel({action.bitmap, granularity}, size));
                break;
            }
            case Kind::remove: models.erase(found); break;
            case Kind::clear: found->second.bits.assign(found->second.bits.size(), false); break;
            case Kind::enable: found->second.spec.enabled = true; break;
            case Kind::disable: found->second.spec.enabled = false; break;
            case Kind::merge: {
                const auto source = models.at(action.source);
                for (std::size_t i = 0; i < source.bits.size(); ++i) {
                    const auto at = i * source.spec.granularity;
                    if (source.bits[i]) found->second.set(at, std::min(source.spec.granularity, size - at));
                }
            }
        }
        return models;
    }

    void write(Image& image, Models& models) {
        const auto at = random_.below(image.size() / sector_bytes) * sector_bytes;
        const auto length = std::min(random_.between(1, 300) * sector_bytes, image.size() - at);
        value_of(image.write({at}, Bytes(length, std::byte{5})));
        for (auto& [name, model] : models) {
            if (model.spec.enabled) model.set(at, length);
        }
    }

    static void expect_bits(Image& image, const Models& models) {
        EXPECT_EQ(value_of(image.info()).bitmaps.size(), models.size());
        for (const auto& [name, model] : models) {
            const auto difference = model.difference(bits_of(image, model.spec));
            ASSERT_FALSE(difference) << *difference;
            const auto info = bitmap_info(image, name);
            EXPECT_EQ(info.enabled, model.spec.enabled) << name;
            EXPECT_EQ(info.granularity, model.spec.granularity) << name;
        }
    }

    static void expect_qemu_agrees(const Files& files, const Models& models, std::uint64_t size) {
        const TemporaryDirectory directory;
        save(files, directory.path());
        const auto checked = qemu_img({"check", "-f", "qcow2", image_name}, directory.path());
        EXPECT_EQ(checked.status, 0) << checked.text();
        std::set<std::string> flags;
        for (const auto& [name, model] : models) {
            flags.insert(fmt::format("{}: {}", name, model.spec.enabled ? "auto" : ""));
            const auto difference = model.difference(bits_in_qemu(model.spec, size, directory.path()));
            EXPECT_FALSE(difference) << "QEMU: " << *difference;
        }
        EXPECT_EQ(flags_in_qemu(directory.path()), flags);
    }

    Random random_ = Random::named(GetParam().name);
    const std::vector<std::string> names_ = {"a", "bitmap with a longer name", "\u00e9", "d"};
};

TEST_P(BitmapChangesTest, AreAsInQemu) {
    SCOPED_TRACE(replay_hint());
    auto files = prepare(GetParam(), random_).files;
    const std::uint64_t size = value_of(open_kind(GetParam(), files, false))->size();
    Models models;
    for (unsigned session = 0; session < 2 * effort(); ++session) {
        const auto image = value_of(open_kind(GetParam(), files, true));
        for (int i = 0; i < 12; ++i) {
            std::vector<BitmapAction> actions;
            auto changed = models;
            for (int k = 0; k < 4; ++k) {
                if (auto action = any_action(changed)) {
                    changed = after(changed, *action, size);
                    actions.push_back(*std::move(action));
                }
            }
            if (random_.chance(20)) {
                // The last one fails, and so does the whole.
                actions.push_back({.kind = Kind::merge, .bitmap = "none", .source = "none"});
                EXPECT_TRUE(fails(image->change_bitmaps(actions), Errc::not_found, {"\"none\""}));
            } else {
                value_of(image->change_bitmaps(actions));
                models = changed;
            }
            ASSERT_NO_FATAL_FAILURE(expect_bits(*image, models));
            write(*image, models);
            ASSERT_NO_FATAL_FAILURE(expect_bits(*image, models));
            if (random_.chance(30)) expect_sound(*image);
        }
        value_of(image->close());
        expect_sound(*value_of(open_kind(GetParam(), files, false)));
        ASSERT_NO_FATAL_FAILURE(expect_qemu_agrees(files, models, size));
    }
}

INSTANTIATE_TEST_SUITE_P(Kinds, BitmapChangesTest, testing::ValuesIn(kinds_of_version_3()),
                         [](const auto& test) { return test.param.name; });

class BitmapLimitsTest : public testing::Test {
protected:
    static std::shared_ptr<Image> image_of(const CreateOptions& create) {
        const auto storage = memory_storage();
        value_of(create_image({storage, nullptr}, create));
        return value_of(open_image(storage, {.writable = true, .format = Format::qcow2}));
    }

    static Result<void> add(Image& image, const std::string& name, std::uint64_t granularity = 0) {
        return image.change_bitmaps(std::array{BitmapAction{.bitmap = name, .granularity = granularity}});
    }
};

TEST_F(BitmapLimitsTest, Refusals) {
    const auto image = image_of({.size = 4096 * KiB * MiB});
    EXPECT_TRUE(fails(add(*image, "a", 512), Errc::limit_exceeded, {"512 MiB", "larger"}));
    value_of(add(*image, "a", KiB));
    EXPECT_TRUE(fails(add(*image, "a"), Errc::invalid_argument, {"\"a\"", "already"}));
    EXPECT_TRUE(fails(add(*image, ""), Errc::invalid_argument, {"1 to 1023"}));
    EXPECT_TRUE(fails(add(*image, std::string(1024, 'x')), Errc::invalid_argument, {"1024 bytes"}));
    value_of(add(*image, std::string(1023, 'x')));
    for (const std::uint64_t granularity : {std::uint64_t{256}, std::uint64_t{513}, 4 * KiB * MiB})
        EXPECT_TRUE(fails(add(*image, "b", granularity), Errc::invalid_argument, {"power of two"}));
    EXPECT_EQ(value_of(image->info()).bitmaps.size(), 2U);
    EXPECT_TRUE(fails(add(*image_of({.size = MiB, .version = 2}), "a"), Errc::unsupported, {"version 2"}));
    EXPECT_TRUE(fails(add(*image_of({.size = 0}), "a"), Errc::invalid_argument, {"0 bytes"}));
}

/// 65,535 bitmaps have room, and no more.
TEST_F(BitmapLimitsTest, ManyBitmaps) {
    const auto image = image_of({.size = KiB, .cluster_size = 512});
    std::vector<BitmapAction> actions;
    for (int i = 0; i < 65535; ++i) actions.push_back({.bitmap = std::to_string(i)});
    value_of(image->change_bitmaps(actions));
    EXPECT_TRUE(fails(add(*image, "more"), Errc::limit_exceeded, {"65535"}));
    EXPECT_EQ(value_of(image->info()).bitmaps.size(), 65535U);
    for (auto& action : actions) action.kind = Kind::remove;
    value_of(image->change_bitmaps(actions));
    expect_sound(*image);
}

TEST_F(BitmapLimitsTest, FromAnotherImage) {
    const auto from = image_of({.size = MiB});
    const auto to = image_of({.size = MiB, .cluster_size = 4096});
    value_of(add(*from, "changes", 4096));
    value_of(from->write({8192}, Bytes(4096, std::byte{1})));
    value_of(add(*to, "changes", 512));
    const BitmapAction merge{.kind = Kind::merge, .bitmap = "changes", .source = "changes", .source_image = from};
    value_of(to->change_bitmaps({&merge, 1}));
    BitmapModel expected({"changes", 512}, MiB);
    expected.set(8192, 4096);
    EXPECT_FALSE(expected.difference(bits_of(*to, expected.spec)));
    value_of(from->resize(2 * MiB));
    EXPECT_TRUE(fails(to->change_bitmaps({&merge, 1}), Errc::invalid_argument, {"1048576", "2097152"}));
}

/// Every write that begins after the bitmap is there is in it, also while other bitmaps come and go.
TEST(LiveBitmapTest, RecordsAllThatBeginsLater) {
    constexpr unsigned writers = 4;
    const auto storage = memory_storage();
    value_of(create_image({storage, nullptr}, {.size = 64 * MiB, .cluster_size = 4096}));
    const auto image = value_of(open_image(storage, {.writable = true, .format = Format::qcow2}));
    std::array<std::atomic<std::uint64_t>, writers> begun = {};
    std::atomic<bool> over = false;
    std::vector<std::thread> threads;
    const auto place = [&](unsigned writer, std::uint64_t n) {
        return (writer + writers * n) * sector_bytes % image->size();
    };
    for (unsigned t = 0; t < writers; ++t) {
        threads.emplace_back([&, t] {
            for (std::uint64_t n = 0; !over; ++n) {
                begun[t] = n + 1;
                value_of(image->write({place(t, n)}, Bytes(sector_bytes, std::byte{1})));
            }
        });
    }
    value_of(image->change_bitmaps(std::array{BitmapAction{.bitmap = "kept", .granularity = 512}}));
    std::array<std::uint64_t, writers> later = {};
    for (unsigned t = 0; t < writers; ++t) later[t] = begun[t];
    for (int i = 0; i < 20; ++i) {
        value_of(image->change_bitmaps(
            std::array{BitmapAction{.bitmap = "passing"},
                       BitmapAction{.kind = Kind::merge, .bitmap = "passing", .source = "kept"}}));
        bits_of(*image, {"kept", 512});
        value_of(image->change_bitmaps(std::array{BitmapAction{.kind = Kind::remove, .bitmap = "passing"}}));
    }
    for (unsigned t = 0; t < writers; ++t) {
        while (begun[t] <= later[t]) std::this_thread::yield();
    }
    over = true;
    for (auto& thread : threads) thread.join();
    const auto bits = bits_of(*image, {"kept", 512});
    for (unsigned t = 0; t < writers; ++t) {
        EXPECT_GT(begun[t], later[t]);
        for (std::uint64_t n = later[t]; n < begun[t]; ++n) ASSERT_TRUE(bits[place(t, n) / 512]) << t << ' ' << n;
    }
    value_of(image->close());
    expect_sound(*image);
}

}  // namespace
}  // namespace qcow::test
