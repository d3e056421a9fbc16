// Damaged images, repaired by QEMU and by us: ours keeps at least as much of what the guest wrote.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/crash_states.h"
#include "engine/image_kinds.h"
#include "interop/damaged_image.h"
#include "qcow/repair.h"
#include "qcow2/repair.h"
#include "support/effort.h"
#include "support/memory_files.h"
#include "support/recording.h"

namespace qcow::test {
namespace {

constexpr std::uint64_t block_bytes = 4096;
constexpr std::uint64_t flag_bits = std::uint64_t{3} << 62 | 1;

/// What can be read of a disk; nothing: a block that cannot be read.
using Contents = std::vector<std::optional<std::string>>;

Contents contents_of(Disk& disk, std::uint64_t bytes) {
    Contents contents;
    for (std::uint64_t at = 0; at < bytes; at += block_bytes) {
        std::string block(std::min(block_bytes, bytes - at), '\0');
        const auto buffer = std::as_writable_bytes(std::span(block));
        const bool read =
            at < disk.size() && disk.read({at}, buffer.first(std::min<std::uint64_t>(buffer.size(), disk.size() - at)));
        contents.push_back(read ? std::optional(std::move(block)) : std::nullopt);
    }
    return contents;
}

Contents contents_of(const std::string& raw) {
    Contents contents;
    for (std::uint64_t at = 0; at < raw.size(); at += block_bytes) contents.emplace_back(raw.substr(at, block_bytes));
    return contents;
}

/// By the name of the snapshot; "" is the active disk.
using Views = std::map<std::string, Contents>;

/// One sound image, and the fields in it that may be damaged.
struct Subject {
    struct Field {
        std::string name;
        std::uint64_t at = 0;
        unsigned width = 8;
        bool is_place = false;  // holds a host offset
    };

    std::string name;
    bool encrypted = false;
    SoundImage image{""};
    Views views;
    char below = 0;  // what holes read as, repeated
    std::vector<Field> fields;
    std::vector<std::uint64_t> places;  // host offsets that a field might wrongly hold
};

class RepairTest : public testing::Test {
protected:
    Subject make(const std::string& name, const std::string& options, std::vector<std::string> commands, bool snapshots,
                 bool bitmap, const Arguments& create = {}) {
        Subject subject;
        subject.name = name;
        subject.encrypted = name.starts_with("encrypted");
        if (subject.encrypted) {
            make_encrypted_image("sound.qcow2", "6M", directory_.path(), options);
        } else {
            Arguments arguments = {"create", "-q", "-f", "qcow2", "-o", options};
            arguments.insert(arguments.end(), create.begin(), create.end());
            arguments.insert(arguments.end(), {"sound.qcow2", "6M"});
            must_qemu_img(arguments, directory_.path());
        }
        if (bitmap) must_qemu_img({"bitmap", "--add", "-g", "65536", "sound.qcow2", "dirty"}, directory_.path());
        std::vector<std::string> names = {""};
        for (const auto& command : commands) {
            if (command.starts_with("snapshot ")) {
                if (!snapshots) continue;
                names.push_back(command.substr(9));
                // It takes no format.
                const auto image = subject.encrypted ? qemu_image("sound.qcow2", true) : Arguments{"sound.qcow2"};
                must_qemu_img(joined_arguments({"snapshot", "-c", names.back()}, image), directory_.path());
            } else {
                must_qemu_io_on_qcow2("sound.qcow2", subject.encrypted, {command}, directory_.path());
            }
        }
        subject.image = SoundImage(file_bytes(directory_.file("sound.qcow2")));
        for (const auto& view : names) subject.views[view] = peer_view(subject, "sound.qcow2", view);
        find_fields(subject, random_);
        return subject;
    }

    /// What QEMU reads.
    Contents peer_view(const Subject& subject, const std::string& image, const std::string& snapshot) {
        std::filesystem::remove(directory_.file("raw"));
        // Some damage makes it run on and on.
        Arguments arguments = {"timeout", "3", "qemu-img", "convert", "--salvage", "-O", "raw"};
        if (!snapshot.empty()) arguments.insert(arguments.end(), {"-l", "snapshot.name=" + snapshot});
        arguments = joined_arguments(joined_arguments(arguments, qemu_image(image, subject.encrypted)), {"raw"});
        const auto converted = run(arguments, directory_.path());
        if (converted.status != 0) return {};
        auto contents = contents_of(file_bytes(directory_.file("raw")));
        constexpr std::string_view unreadable = "error while reading offset ";
        for (auto at = converted.err.find(unreadable); at != std::string::npos;
             at = converted.err.find(unreadable, at)) {
            at += unreadable.size();
            contents.at(std::stoull(converted.err.substr(at, 20)) / block_bytes).reset();
        }
        return contents;
    }

    /// The peer takes a name to end with its first zero byte.
    static std::shared_ptr<Disk> snapshot_of(Image& image, const std::string& name) {
        for (const auto& snapshot : value_of(image.info()).snapshots) {
            if (std::string(snapshot.name.c_str()) == name)
                return image.snapshots().open(snapshot.id).value_or(nullptr);
        }
        return nullptr;
    }

    static Views our_views(Image& image, const Subject& subject) {
        Views views;
        for (const auto& [name, contents] : subject.views) {
            const auto bytes = contents.size() * block_bytes;
            if (name.empty()) {
                views[name] = contents_of(image, bytes);
            } else if (const auto disk = snapshot_of(image, name)) {
                // A smaller disk than before is no damage.
                views[name] = contents_of(*disk, std::min(bytes, disk->size() / block_bytes * block_bytes));
            }
        }
        return views;
    }

    static void find_fields(Subject& subject, Random& random) {
        const auto& image = subject.image;
        auto& fields = subject.fields;
        const auto cluster = image.cluster_size();
        const bool version3 = image.number(4, 4) >= 3;
        const unsigned entry_bytes = version3 && (image.number(72) & 16) != 0 ? 16 : 8;
        // The header's other fields are not for a repair: an image without them is none.
        fields = {{"l1_size", 36, 4},           {"l1_offset", 40, 8, true}, {"refcount_offset", 48, 8, true},
                  {"refcount_clusters", 56, 4}, {"snapshot_count", 60, 4},  {"snapshot_offset", 64, 8, true}};
        if (version3) fields.insert(fields.end(), {{"incompatible", 79, 1}, {"autoclear", 95, 1}});
        auto& places = subject.places;
        const auto end = (image.size() + cluster - 1) / cluster * cluster;
        places = {0,
                  image.l1(),
                  image.refcount_table(),
                  image.first_refcount_block(),
                  end - cluster,
                  end,
                  end + cluster,
                  end + 512,
                  std::uint64_t{1} << 40,
                  (std::uint64_t{1} << 56) - cluster};
        const auto add_entries = [&](const std::string& name, std::uint64_t at, std::uint64_t count, std::uint64_t step,
                                     unsigned kept_in_ten) {
            for (std::uint64_t i = 0; i < count; ++i) {
                const bool used = image.number(at + i * step) != 0;
                if (!used && !random.chance(1)) continue;
                if (random.below(10) >= kept_in_ten) continue;
                fields.push_back({fmt::format("{}[{}]", name, i), at + i * step, 8, true});
                if (step == 16) fields.push_back({fmt::format("{}[{}].bitmap", name, i), at + i * step + 8, 8});
                if (used) places.push_back(image.number(at + i * step) & SoundImage::offset_mask & ~(cluster - 1));
            }
        };
        const auto add_mapping = [&](const std::string& name, std::uint64_t l1, std::uint64_t entries) {
            add_entries(name + "_l1", l1, entries, 8, 10);
            for (std::uint64_t i = 0; i < entries; ++i) {
                const auto l2 = image.number(l1 + 8 * i) & SoundImage::offset_mask;
                if (l2 == 0) continue;
                add_entries(fmt::format("{}_l2_{}", name, i), l2, cluster / entry_bytes, entry_bytes, 3);
            }
        };
        add_mapping("active", image.l1(), image.number(36, 4));
        add_entries("refcounts", image.refcount_table(), cluster / 8, 8, 10);
        for (unsigned i = 0; i < 12; ++i) {
            const auto at = image.first_refcount_block() + random.below(image.size() / cluster * 2);
            fields.push_back({fmt::format("refcount@{:#x}", at), at, 1});
        }
        if (image.number(60, 4) != 0) {
            const auto at = image.snapshots();
            places.push_back(at);
            fields.insert(fields.end(), {{"snapshot.l1", at, 8, true},
                                         {"snapshot.l1_size", at + 8, 4},
                                         {"snapshot.id_size", at + 12, 2},
                                         {"snapshot.name_size", at + 14, 2},
                                         {"snapshot.extra_size", at + 36, 4},
                                         {"snapshot.disk_size", at + 48, 8}});
            add_mapping("snapshot", image.number(at), image.number(at + 8, 4));
        }
        if (version3 && (image.number(95, 1) & 1) != 0) {
            const auto extension = image.extension(0x23852875);
            const auto directory = image.bitmap_directory();
            places.push_back(directory);
            fields.insert(fields.end(), {{"bitmaps.count", extension, 4},
                                         {"bitmaps.directory_size", extension + 8, 8},
                                         {"bitmaps.directory", extension + 16, 8, true},
                                         {"bitmap.table", directory, 8, true},
                                         {"bitmap.table_size", directory + 8, 4},
                                         {"bitmap.flags", directory + 12, 4},
                                         {"bitmap.granularity", directory + 17, 1},
                                         {"bitmap.name_size", directory + 18, 2}});
            add_entries("bitmap", image.number(directory), image.number(directory + 8, 4), 8, 10);
        }
    }

    static Damage random_damage(const Subject& subject, Random& random) {
        const auto field = random.pick(subject.fields);
        const auto now = subject.image.number(field.at, field.width);
        const auto all = field.width == 8 ? ~std::uint64_t{0} : (std::uint64_t{1} << (8 * field.width)) - 1;
        std::uint64_t value = now;
        while (value == now) {
            switch (random.below(field.is_place ? 6 : 3)) {
                case 0: value = now ^ std::uint64_t{1} << random.below(8 * field.width); break;
                case 1: value = random.pick({std::uint64_t{0}, std::uint64_t{1}, all, all >> 1}); break;
                case 2: value = (random.chance(50) ? now + 1 : now - 1) & all; break;
                case 3: value = now + 512 * random.below(16); break;
                default: value = random.pick(subject.places) | (now & flag_bits); break;
            }
            if (field.name == "bitmap.flags") value &= ~std::uint64_t{4};  // which the peer refuses, but the format has
        }
        return {field.name, field.at, field.width, value};
    }

    /// How many blocks of `ours` are not as they were, although they are in `theirs`.
    static std::string worse_than(const Views& theirs, const Views& ours, const Subject& subject) {
        for (const auto& [name, sound] : subject.views) {
            const auto their = theirs.find(name);
            if (their == theirs.end()) continue;
            const auto our = ours.find(name);
            for (std::size_t i = 0; i < std::min(sound.size(), their->second.size()); ++i) {
                if (their->second[i] != sound[i]) continue;
                if (our == ours.end()) {
                    if (*sound[i] == std::string(sound[i]->size(), subject.below)) continue;
                    return fmt::format("view \"{}\" is missing", name);
                }
                if (i < our->second.size() && our->second[i] != sound[i]) {
                    return fmt::format("view \"{}\", guest offset {:#x} is {}", name, i * block_bytes,
                                       our->second[i] ? "something else" : "unreadable");
                }
            }
        }
        return "";
    }

    void expect_repair(const Subject& subject, const std::string& damaged) {
        put_file(directory_.file("theirs.qcow2"), damaged);
        put_file(directory_.file("ours.qcow2"), damaged);
        const auto peer = qemu_img({"check", "-r", "all", "-f", "qcow2", "theirs.qcow2"}, directory_.path());
        Views theirs;
        for (const auto& [name, contents] : subject.views) theirs[name] = peer_view(subject, "theirs.qcow2", name);

        const auto path = directory_.file("ours.qcow2");
        RepairOptions options;
        options.workers = 2;
        options.dry_run = true;
        const auto planned = repair({.location = {.path = path}}, options);
        EXPECT_EQ(file_bytes(path), damaged) << "a dry run wrote";
        options.dry_run = false;
        const auto repaired = repair({.location = {.path = path}}, options);
        EXPECT_EQ(planned.has_value(), repaired.has_value());
        if (!repaired) {
            EXPECT_EQ(worse_than(theirs, {}, subject), "") << repaired.error().message() << "\n" << peer.text();
            return;
        }
        EXPECT_EQ(planned->losses.size(), repaired->losses.size());
        const auto image = try_open(path, Format::qcow2);
        ASSERT_TRUE(image) << image.error().message();
        EXPECT_EQ(worse_than(theirs, our_views(**image, subject), subject), "") << peer.text();
        const auto report = value_of((*image)->check({}));
        for (const auto& finding : report.findings) ADD_FAILURE() << finding.place << ": " << finding.what;
        EXPECT_TRUE(report.clean());
        EXPECT_TRUE(repaired->after.clean());
        const auto again = qemu_img({"check", "-f", "qcow2", "ours.qcow2"}, directory_.path());
        EXPECT_EQ(again.status, 0) << again.text();
    }

    /// One or two damages.
    static std::string damage(const Subject& subject, Random& random, std::string& trace) {
        auto image = subject.image;
        const auto put = [&] {
            const auto damage = random_damage(subject, random);
            trace += fmt::format("; {}: at {:#x}: {:#x} becomes {:#x}", damage.name, damage.at,
                                 image.number(damage.at, damage.width), damage.value);
            image = SoundImage(image.with(damage));
        };
        trace = subject.name;
        put();
        if (random.chance(50)) put();
        trace += "; " + replay_hint();
        return image.bytes();
    }

    static Views memory_views(const Files& files, const Subject& subject) {
        const auto image =
            open_image(files.at(image_name), {.format = Format::qcow2, .gate = gate_to(files), .keys = key_of_tests});
        return image ? our_views(**image, subject) : Views();
    }

    /// Loses the power at some moments of a repair. Returns how many clusters the repair copies. `intact`: what the
    /// guest reads never changes.
    std::uint64_t expect_repair_survives(const Subject& subject, const std::string& damaged, unsigned losses,
                                         bool intact = false) {
        const auto bytes = std::as_bytes(std::span(damaged));
        const Files before = {{image_name, memory_storage({bytes.begin(), bytes.end()}, image_name)}};
        const auto damaged_views = memory_views(before, subject);
        const auto after = copy_of(before);
        StorageLog log;
        RepairOptions options;
        options.workers = 1;
        const auto repaired = qcow2::repair_image(
            std::make_shared<RecordingStorage>(after.at(image_name), image_name, log), nullptr, options, unlock);
        if (!repaired) return 0;  // the header
        const auto whole = memory_views(after, subject);
        CrashStates states(log, before);
        EXPECT_TRUE(!intact || whole == damaged_views);
        std::vector<std::size_t> moments;
        for (unsigned i = 0; i < losses; ++i) moments.push_back(random_.between(1, log.events().size()));
        std::ranges::sort(moments);
        for (const auto moment : moments) {
            states.advance(moment);
            const auto seed = random_.below(1U << 30);
            const bool all = random_.chance(25);
            const auto crashed = states.build([&](std::size_t event, std::uint64_t sector) {
                return all || Random(seed ^ event << 32 ^ sector).chance(50);
            });
            SCOPED_TRACE(fmt::format("power loss before event {}, seed {}, all {}", moment, seed, all));
            const auto incomplete = memory_views(crashed, subject);
            EXPECT_EQ(worse_than(damaged_views, incomplete, subject), "") << "when it is incomplete";
            const auto again = value_of(qcow2::repair_image(crashed.at(image_name), nullptr, options, unlock));
            const auto completed = memory_views(crashed, subject);
            EXPECT_EQ(worse_than(whole, completed, subject), "") << "after the second repair";
            EXPECT_TRUE(again.after.clean());
            EXPECT_TRUE(!intact || (incomplete == damaged_views && completed == damaged_views));
        }
        return repaired->copied_clusters;
    }

    /// Some entries lead to the clusters of others.
    std::string overlap(const Subject& subject) {
        auto image = subject.image;
        std::vector<Subject::Field> entries;
        for (const auto& field : subject.fields) {
            const auto word = image.number(field.at);
            const bool compressed = (word >> 62 & 1) != 0;
            if (field.name.contains("_l2_") && !field.name.ends_with(".bitmap") && !compressed &&
                (word & SoundImage::offset_mask) != 0)
                entries.push_back(field);
        }
        for (unsigned i = 0; i < 3; ++i) {
            const auto field = random_.pick(entries);
            const auto place = image.number(random_.pick(entries).at) & SoundImage::offset_mask;
            image = SoundImage(image.with({field.name, field.at, 8, place | (image.number(field.at) & flag_bits)}));
        }
        return image.bytes();
    }

    std::vector<Subject> subjects() {
        std::vector<Subject> subjects;
        const std::vector<std::string> usual = {
            "write -q -P 1 0 40k", "write -q -c -P 2 64k 64k", "write -q -P 4 5M 64k", "snapshot first",
            "write -q -P 5 0 16k", "write -q -P 6 32k 8k",     "write -q -P 7 3M 4k",  "write -q -P 8 1M 8k"};
        auto zeros = usual;
        zeros.insert(zeros.end(), {"write -q -z 1M 4k", "write -q -z 2M 4k", "snapshot second", "write -q -P 9 4k 4k"});
        subjects.push_back(make("usual", "cluster_size=4096", zeros, true, true));
        subjects.push_back(make("version2", "cluster_size=4096,compat=0.10", usual, true, false));
        subjects.push_back(make("one_bit", "cluster_size=4096,refcount_bits=1", zeros, false, false));
        subjects.push_back(make("small", "cluster_size=512,refcount_bits=64", zeros, true, false));
        subjects.push_back(make("subclusters", "cluster_size=16384,extended_l2=on", zeros, true, true));
        subjects.push_back(make("lazy", "cluster_size=65536,lazy_refcounts=on", zeros, true, false));
        auto plain = zeros;
        std::erase_if(plain, [](const std::string& command) { return command.find("-c") != std::string::npos; });
        subjects.push_back(make("external", "cluster_size=4096,data_file=sound.data", plain, false, false));
        must_qemu_img({"create", "-q", "-f", "raw", "base.raw", "6M"}, directory_.path());
        must_qemu_io("base.raw", "raw", {"write -q -P 0xb 0 6M"}, directory_.path());
        subjects.push_back(make("overlay", "cluster_size=4096", zeros, true, false, {"-b", "base.raw", "-F", "raw"}));
        subjects.back().below = 0xb;
        return subjects;
    }

    TemporaryDirectory directory_;
    Random random_ = Random::named("repair");
};

/// QCOW_REPAIRS: how many images.
unsigned images_to_repair() {
    const char* given = std::getenv("QCOW_REPAIRS");
    return given == nullptr ? rounds(28) : static_cast<unsigned>(std::strtoul(given, nullptr, 10));
}

TEST_F(RepairTest, KeepsAtLeastWhatThePeerKeeps) {
    const auto all = subjects();
    for (unsigned i = 0; i < images_to_repair(); ++i) {
        const auto& subject = all[i % all.size()];
        std::string trace;
        const auto damaged = damage(subject, random_, trace);
        SCOPED_TRACE(fmt::format("{} {}", i, trace));
        expect_repair(subject, damaged);
    }
}

/// Some moments of a repair, and what a power loss may leave of the writes that are not durable then.
TEST_F(RepairTest, PowerLossLosesNothingMore) {
    auto all = subjects();
    std::erase_if(all, [](const Subject& subject) { return subject.name == "overlay" || subject.name == "external"; });
    for (unsigned i = 0; i < 2 * images_to_repair(); ++i) {
        const auto& subject = all[i % all.size()];
        std::string trace;
        const auto bytes = damage(subject, random_, trace);
        SCOPED_TRACE(fmt::format("{} {}", i, trace));
        expect_repair_survives(subject, bytes, 3);
    }
}

#ifdef QCOW_HAS_DIGEST  // and so, OpenSSL
/// Data that get a place of their own are encrypted again. The guest reads the same before, meanwhile, and afterwards.
TEST_F(RepairTest, EncryptedDataStayWhatTheyAreAfterPowerLosses) {
    const std::vector<std::string> commands = {
        "write -q -P 1 0 64k", "write -q -c -P 2 64k 64k", "write -q -P 3 5M 64k", "snapshot first",
        "write -q -P 4 0 16k", "write -q -P 5 3M 4k",      "write -q -P 6 1M 8k"};
    const std::vector<Subject> all = {
        make("encrypted", "cluster_size=4096", commands, true, false),
        make("encrypted_subclusters", "cluster_size=16384,extended_l2=on", commands, true, false)};
    std::uint64_t copied = 0;
    for (unsigned i = 0; i < rounds(6); ++i) {
        const auto& subject = all[i % all.size()];
        SCOPED_TRACE(fmt::format("{} {}; {}", i, subject.name, replay_hint()));
        copied += expect_repair_survives(subject, overlap(subject), 10, true);
    }
    EXPECT_GE(copied, rounds(6));
}

/// The key lies where the header says. So the header is corrected first.
TEST_F(RepairTest, ADamagedHeaderDoesNotHideTheKey) {
    const auto subject = make("encrypted", "cluster_size=4096", {"write -q -P 1 0 64k"}, false, false);
    const auto& sound = subject.image;
    const SoundImage overlapping(sound.with({"l2", sound.l2_entry(1), 8, sound.number(sound.l2_entry(0))}));
    const auto path = directory_.file("ours.qcow2");
    put_file(path, overlapping.with({"l1_size", 36, 4, 0}));
    const auto repaired = value_of(repair({.location = {.path = path}, .keys = key_of_tests}));
    EXPECT_EQ(repaired.copied_clusters, 1);
    EXPECT_TRUE(repaired.after.clean());
    must_qemu_io_on_qcow2("ours.qcow2", true, {"read -q -P 1 0 64k"}, directory_.path());
    EXPECT_EQ(qemu_check("ours.qcow2", true, directory_.path()).status, 0);
}
#endif

TEST_F(RepairTest, GivesBackLeaksOnly) {
    for (const auto& subject : fewer(subjects())) {
        if (subject.name == "external" || subject.image.number(subject.image.first_refcount_block(), 2) != 1) continue;
        SCOPED_TRACE(subject.name);
        // A cluster in the middle that nothing uses, and many behind the end of the file.
        auto bytes = subject.image.bytes();
        const auto& image = subject.image;
        const auto clusters = (image.size() + image.cluster_size() - 1) / image.cluster_size();
        bytes.resize((clusters + 5) * image.cluster_size());
        for (std::uint64_t i = clusters; i < clusters + 5; ++i)
            bytes[image.first_refcount_block() + 2 * i + 1] = static_cast<char>(i % 3 + 1);
        const auto path = directory_.file("ours.qcow2");
        put_file(path, bytes);
        RepairOptions options;
        options.what = RepairOptions::What::leaks;
        const auto repaired = value_of(repair({.location = {.path = path}}, options));
        EXPECT_EQ(repaired.before.leaks, 5);
        EXPECT_EQ(repaired.leaks_fixed, 5);
        EXPECT_TRUE(repaired.after.clean());
        EXPECT_LE(std::filesystem::file_size(path), clusters * image.cluster_size());
        EXPECT_EQ(worse_than(subject.views, our_views(*must_open(path), subject), subject), "");
        EXPECT_EQ(qemu_img({"check", "ours.qcow2"}, directory_.path()).status, 0);
        EXPECT_FALSE(value_of(repair({.location = {.path = path}}, options)).changed);
    }
}

}  // namespace
}  // namespace qcow::test
