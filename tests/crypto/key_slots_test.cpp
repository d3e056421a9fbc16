// Changes of the key slots of LUKS1, and headers that are hostile.

#include <algorithm>
#include <map>

#include "base/endian.h"
#include "crypto/encryption_fixture.h"
#include "format/header.h"
#include "format/luks.h"
#include "luks/volume.h"
#include "qcow/amend.h"
#include "qcow/create.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using testing::HasSubstr;

class KeySlotsTest : public EncryptionTest {
protected:
    [[nodiscard]] format::Luks1Header header(const std::string& name, std::uint64_t at = 0) const {
        const auto bytes = file(name);
        return must(format::parse_luks1_header(std::span(bytes).subspan(at)));
    }

    [[nodiscard]] Bytes material(const std::string& name, std::uint64_t at, unsigned slot) const {
        const auto h = header(name, at);
        const auto bytes = file(name);
        const auto begin = at + h.slots[slot].material_sector * 512;
        return {bytes.begin() + static_cast<std::ptrdiff_t>(begin),
                bytes.begin() + static_cast<std::ptrdiff_t>(begin + h.material_bytes())};
    }

    /// Where the LUKS header of a qcow2 image lies.
    [[nodiscard]] std::uint64_t luks_at(const std::string& name) const {
        return must(format::parse_header(first(file(name), 65536))).encryption->offset.value;
    }
};

TEST_F(KeySlotsTest, AreAddedReplacedAndErased) {
    make_qcow2("disk.qcow2");
    must_tool({"convert", "-f", "raw", "-O", "luks", "--object", secret_option, "-o", "key-secret=s,iter-time=10",
               "disk.raw", "disk.luks"});
    const Arguments new_key = {"--object", "secret,id=n,data=new"};
    std::ofstream(directory_.file("new")) << "new";
    for (const std::string name : {"disk.qcow2", "disk.luks"}) {
        SCOPED_TRACE(name);
        const std::uint64_t at = name == "disk.luks" ? 0 : luks_at(name);
        const Arguments format = {"-f", name == "disk.luks" ? "luks" : "qcow2"};
        const auto amend = [&](const Arguments& keys, const std::string& options, bool force = false) {
            auto all = joined_arguments(joined_arguments({"amend"}, format), keys);
            if (force) all.emplace_back("--force");
            return joined_arguments(all, {"-o", options, name});
        };
        const auto with_old_key = joined_arguments({"--key", "key"}, new_key);
        must_tool(amend(with_old_key, "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10"));
        EXPECT_TRUE(header(name, at).slots[1].used);
        EXPECT_EQ(tool(joined_arguments(joined_arguments({"compare", "--key", "new", "-F", "raw"}, format),
                                        {name, "disk.raw"}))
                      .status,
                  0);
        expect_refusal(amend(with_old_key, "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0"),
                       HasSubstr("--force"));
        expect_refusal(
            amend(joined_arguments({"--key", "wrong"}, new_key), "encrypt.state=active,encrypt.new-secret=n"),
            HasSubstr("the key is wrong"));
        const auto before = material(name, at, 0);
        must_tool(amend({"--object", secret_option}, "encrypt.state=inactive,encrypt.old-secret=s"));
        EXPECT_FALSE(header(name, at).slots[0].used);
        EXPECT_EQ(header(name, at).slots[0].iterations, 0U);
        const auto after = material(name, at, 0);
        // Nothing of the key material is left, not even a part of it.
        for (std::size_t i = 0; i + 16 <= before.size(); i += 16)
            ASSERT_FALSE(std::equal(before.begin() + i, before.begin() + i + 16, after.begin() + i)) << i;
        expect_refusal(joined_arguments(joined_arguments({"convert", "--key", "key"}, format), {name, "out.raw"}),
                       HasSubstr("the key is wrong"));
        expect_refusal(amend({}, "encrypt.state=inactive,encrypt.keyslot=1"), HasSubstr("last key slots"));
        expect_refusal(amend(new_key, "encrypt.state=inactive,encrypt.old-secret=n"), HasSubstr("last key slots"));
        must_tool(amend({}, "encrypt.state=inactive,encrypt.keyslot=5"));
        EXPECT_EQ(header(name, at).slots[5].iterations, 0U);
        EXPECT_TRUE(header(name, at).slots[1].used);
        expect_refusal(amend({}, "encrypt.keyslot=1"), HasSubstr("encrypt.state=active or inactive"));
        must_tool(amend({}, "encrypt.state=inactive,encrypt.keyslot=1", true));
        expect_refusal(joined_arguments(joined_arguments({"convert", "--key", "new"}, format), {name, "out.raw"}),
                       HasSubstr("no key slot is in use"));
    }
}

/// As QEMU, which refuses all of these, too.
TEST_F(KeySlotsTest, OptionsThatContradictEachOther) {
    make_qcow2("disk.qcow2");
    const Arguments secrets = {"--object", secret_option, "--object", "secret,id=n,data=new"};
    must_tool(joined_arguments(
        {"amend"}, joined_arguments(secrets, {"-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10",
                                              "disk.qcow2"})));
    const auto before = bytes_of("disk.qcow2");
    const std::map<std::string, std::string> refused = {
        {"encrypt.state=inactive,encrypt.keyslot=0,encrypt.old-secret=n", "does not open key slot 0"},
        {"encrypt.state=inactive,encrypt.keyslot=0,encrypt.new-secret=n", "encrypt.state=inactive"},
        {"encrypt.state=inactive,encrypt.keyslot=0,encrypt.iter-time=10", "encrypt.state=inactive"},
        {"encrypt.state=active,encrypt.new-secret=n,encrypt.old-secret=s", "encrypt.state=active"}};
    for (const auto& [options, error] : refused) {
        SCOPED_TRACE(options);
        expect_refusal(joined_arguments({"amend"}, joined_arguments(secrets, {"-o", options, "disk.qcow2"})),
                       HasSubstr(error));
        const auto theirs = qemu_img(
            joined_arguments({"amend"},
                             joined_arguments(secrets, {"--image-opts", opened("qcow2", "disk.qcow2"), "-o", options})),
            directory_.path());
        EXPECT_EQ(theirs.status, 1) << theirs.text();
        EXPECT_TRUE(bytes_of("disk.qcow2") == before);
    }
    must_tool(joined_arguments(
        {"amend"}, joined_arguments(secrets, {"-o", "encrypt.state=inactive,encrypt.keyslot=0,encrypt.old-secret=s",
                                              "disk.qcow2"})));
    EXPECT_FALSE(header("disk.qcow2", luks_at("disk.qcow2")).slots[0].used);
}

/// At every moment, the old passphrase opens the image or the new one does.
TEST_F(KeySlotsTest, ReplacingTheOnlyPassphraseMayBeKilled) {
    make_qcow2("disk.qcow2");
    const auto before = bytes_of("disk.qcow2");
    std::ofstream(directory_.file("new")) << "new";
    const std::string replace =
        " amend --key key --force --object secret,id=n,data=new -o "
        "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0,encrypt.iter-time=10 disk.qcow2";
    unsigned kills = 0;
    for (;; ++kills) {
        put_file(directory_.file("disk.qcow2"), before);
        const auto done =
            run({"sh", "-c",
                 fmt::format("ASAN_OPTIONS=detect_leaks=0 exec strace -f -o /dev/null -e trace=fdatasync -e "
                             "inject=fdatasync:signal=KILL:when={} {}{}",
                             kills + 1, QCOW_TOOL, replace)},
                directory_.path());
        const auto opens = [&](const std::string& key) {
            return tool({"compare", "--key", key, "-F", "raw", "disk.qcow2", "disk.raw"}).status == 0;
        };
        if (done.status == 0) {
            EXPECT_FALSE(opens("key"));
            EXPECT_TRUE(opens("new"));
            break;
        }
        EXPECT_TRUE(opens("key") || opens("new")) << "killed at flush " << kills + 1;
    }
    EXPECT_GE(kills, 6U);
    const auto slots = header("disk.qcow2", luks_at("disk.qcow2")).slots;
    EXPECT_TRUE(slots[0].used);
    EXPECT_EQ(std::ranges::count(slots, true, &format::LuksSlot::used), 1);
    // Without an unused slot there is no way that is safe.
    for (int i = 0; i < 7; ++i) {
        must_tool({"amend", "--key", "new", "--object", "secret,id=n,data=more", "-o",
                   "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10", "disk.qcow2"});
    }
    expect_refusal({"amend", "--key", "new", "--force", "--object", "secret,id=n,data=x", "-o",
                    "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=0", "disk.qcow2"},
                   HasSubstr("erase one"));
}

/// What every other command refuses to write is not written here either.
TEST_F(KeySlotsTest, DamagedImagesStayAsTheyAre) {
    make_qcow2("disk.qcow2");
    must_tool({"convert", "-f", "raw", "-O", "luks", "--object", secret_option, "-o", "key-secret=s,iter-time=10",
               "disk.raw", "disk.luks"});
    const auto number = [](std::uint64_t value, unsigned width) {
        const auto bytes = big_endian_bytes(value, width);
        return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    };
    const auto refused = [&](const std::string& name, const std::string& bytes) {
        put_file(directory_.file(name), bytes);
        for (const Arguments& options : {Arguments{"--key", "key", "--object", "secret,id=n,data=new", "-o",
                                                   "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10"},
                                         Arguments{"--force", "-o", "encrypt.state=inactive,encrypt.keyslot=0"}}) {
            const auto done =
                tool(joined_arguments(joined_arguments({"amend", "-f", name.substr(5)}, options), {name}));
            EXPECT_EQ(done.status, 1);
            EXPECT_TRUE(bytes_of(name) == bytes) << done.err;
        }
    };
    // The key material of a slot that is not in use would lie over data.
    auto luks = bytes_of("disk.luks");
    const auto payload = header("disk.luks").payload_sector;
    luks.replace(208 + 48 + 40, 4, number(payload + 8, 4));
    refused("disk.luks", luks);
    const auto whole = bytes_of("disk.qcow2");
    auto corrupt = whole;
    corrupt[79] = static_cast<char>(corrupt[79] | 2);
    refused("disk.qcow2", corrupt);
    // The length of the encryption header, in the first extension that has this type.
    const auto extension = whole.find("\x05\x37\xbe\x77");
    ASSERT_NE(extension, std::string::npos);
    for (const auto length :
         {std::uint64_t{1} << 63, static_cast<std::uint64_t>(whole.size() - luks_at("disk.qcow2"))}) {
        auto too_long = whole;
        too_long.replace(extension + 16, 8, number(length, 8));
        refused("disk.qcow2", too_long);
    }
}

/// Nor is anything where a table leads into the key material, whatever the refcounts say.
TEST_F(KeySlotsTest, GuestDataInTheirClustersStay) {
    make_qcow2("disk.qcow2");
    const auto number = [](std::uint64_t value, unsigned width) {
        const auto bytes = big_endian_bytes(value, width);
        return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
    };
    const auto whole = bytes_of("disk.qcow2");
    const auto be64 = [&](std::uint64_t at) { return load_be<std::uint64_t>(file("disk.qcow2"), at); };
    const auto l2 = be64(be64(40)) & 0x00fffffffffffe00;
    const auto refcounts = be64(be64(48));
    const auto cluster = luks_at("disk.qcow2") / 65536 + 0x1d;  // key material of slot 7
    const auto leading = number((cluster * 65536) | std::uint64_t{1} << 63, 8);
    auto copied = whole;
    copied.replace(l2 + 24, 8, leading);
    auto counted = whole;
    counted.replace(l2 + 24, 8, number(cluster * 65536, 8));
    counted.replace(refcounts + 2 * cluster, 2, number(2, 2));
    auto uncounted = whole;
    uncounted.replace(refcounts + 2 * cluster, 2, number(0, 2));
    for (const auto& bytes : {copied, counted, uncounted}) {
        put_file(directory_.file("disk.qcow2"), bytes);
        for (const Arguments& options :
             {Arguments{"--key", "key", "--object", "secret,id=n,data=new", "-o",
                        "encrypt.state=active,encrypt.new-secret=n,encrypt.keyslot=7,encrypt.iter-time=10"},
              Arguments{"--force", "-o", "encrypt.state=inactive,encrypt.keyslot=0"}}) {
            expect_refusal(joined_arguments({"amend"}, joined_arguments(options, {"disk.qcow2"})),
                           HasSubstr("qcow check -r all"));
            EXPECT_TRUE(bytes_of("disk.qcow2") == bytes);
        }
    }
}

/// Wherever it is killed, a slot that is in use opens the image, and running it again erases what is left.
TEST_F(KeySlotsTest, ErasingMayBeKilled) {
    make_qcow2("disk.qcow2");
    std::ofstream(directory_.file("new")) << "new";
    must_tool({"amend", "--key", "key", "--object", "secret,id=n,data=new", "-o",
               "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10", "disk.qcow2"});
    const auto before = bytes_of("disk.qcow2");
    const auto at = luks_at("disk.qcow2");
    const auto erased = material("disk.qcow2", at, 0);
    const Arguments by_number = {"-o", "encrypt.state=inactive,encrypt.keyslot=0", "disk.qcow2"};
    const Arguments by_passphrase = {"--object", secret_option, "-o", "encrypt.state=inactive,encrypt.old-secret=s",
                                     "disk.qcow2"};
    for (const std::string call : {"pwritev", "fdatasync"}) {
        unsigned kills = 0;
        for (bool done = false; !done; ++kills) {
            SCOPED_TRACE(fmt::format("{} {}", call, kills + 1));
            put_file(directory_.file("disk.qcow2"), before);
            done = run({"sh", "-c",
                        fmt::format("ASAN_OPTIONS=detect_leaks=0 exec strace -f -o /dev/null -e trace={0} -e "
                                    "inject={0}:signal=KILL:when={1} {2} amend -o "
                                    "encrypt.state=inactive,encrypt.keyslot=0 disk.qcow2",
                                    call, kills + 1, QCOW_TOOL)},
                       directory_.path())
                       .status == 0;
            const auto opens = [&](const std::string& key) {
                return tool({"compare", "--key", key, "-F", "raw", "disk.qcow2", "disk.raw"}).status == 0;
            };
            const auto killed = bytes_of("disk.qcow2");
            const bool used = header("disk.qcow2", at).slots[0].used;
            EXPECT_EQ(opens("key"), used);
            if (!used) {
                expect_refusal({"amend", "-o", "encrypt.state=inactive,encrypt.keyslot=1", "disk.qcow2"},
                               HasSubstr("last key slots"));
            }
            for (const auto& again : {by_number, by_passphrase}) {
                put_file(directory_.file("disk.qcow2"), killed);
                // By its passphrase, a slot that is not in use is not found. What is left of it goes all the same.
                EXPECT_EQ(tool(joined_arguments({"amend"}, again)).status, used || again == by_number ? 0 : 1);
                EXPECT_FALSE(opens("key"));
                EXPECT_TRUE(opens("new"));
                const auto after = material("disk.qcow2", at, 0);
                for (std::size_t i = 0; i + 16 <= erased.size(); i += 16)
                    ASSERT_FALSE(std::equal(erased.begin() + i, erased.begin() + i + 16, after.begin() + i)) << i;
            }
        }
        EXPECT_GE(kills, 3U);
    }
}

/// Compaction moves them. Wherever it is killed, no other copy of a slot outlives its erasure.
TEST_F(KeySlotsTest, CopiesOfAKilledCompactionAreErased) {
    make_qcow2("disk.qcow2");
    std::ofstream(directory_.file("new")) << "new";
    auto bytes = bytes_of("disk.qcow2");
    const auto at = luks_at("disk.qcow2");
    const auto key_material = material("disk.qcow2", at, 0);
    const std::string wanted(reinterpret_cast<const char*>(key_material.data()), key_material.size());
    const auto extension = bytes.find("\x05\x37\xbe\x77");
    const auto length = align_down(load_be<std::uint64_t>(file("disk.qcow2"), extension + 16) + 65535, 65536);
    const auto end = align_down(bytes.size() + 65535, 65536);
    bytes.resize(end);
    bytes += bytes.substr(at, length);
    bytes.resize(end + length);
    bytes.replace(at, length, length, '\0');
    const auto place = big_endian_bytes(end, 8);
    bytes.replace(extension + 8, 8, reinterpret_cast<const char*>(place.data()), 8);
    put_file(directory_.file("disk.qcow2"), bytes);
    must_tool({"check", "-q", "-r", "all", "disk.qcow2"});
    const auto before = bytes_of("disk.qcow2");
    unsigned kills = 0;
    for (bool done = false; !done; ++kills) {
        SCOPED_TRACE(fmt::format("killed at flush {}", kills + 1));
        put_file(directory_.file("disk.qcow2"), before);
        done = run({"sh", "-c",
                    fmt::format("ASAN_OPTIONS=detect_leaks=0 exec strace -f -o /dev/null -e trace=fdatasync -e "
                                "inject=fdatasync:signal=KILL:when={} {} compact -q --key key disk.qcow2",
                                kills + 1, QCOW_TOOL)},
                   directory_.path())
                   .status == 0;
        must_tool({"amend", "--key", "key", "--object", "secret,id=n,data=new", "-o",
                   "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10", "disk.qcow2"});
        must_tool({"amend", "-o", "encrypt.state=inactive,encrypt.keyslot=0", "disk.qcow2"});
        EXPECT_EQ(tool({"compare", "--key", "new", "-F", "raw", "disk.qcow2", "disk.raw"}).status, 0);
        const auto after = bytes_of("disk.qcow2");
        for (std::size_t i = 0; i < wanted.size(); i += 512)
            ASSERT_EQ(after.find(wanted.substr(i, 64)), std::string::npos) << i;
    }
    EXPECT_GE(kills, 4U);
    EXPECT_LT(bytes_of("disk.qcow2").size(), before.size());
}

/// What the tool refuses before, the library refuses, too.
TEST_F(KeySlotsTest, ChangesThatTheLibraryRefuses) {
    make_qcow2("disk.qcow2");
    const auto before = bytes_of("disk.qcow2");
    const auto secret = [](const char* text) { return std::make_shared<const Secret>(text_bytes(text)); };
    const auto change = [&](const KeySlotChange& slots, std::stop_token stop = {}) {
        AmendJob job;
        job.image.location.path = directory_.file("disk.qcow2");
        job.image.keys = [](const KeyRequest&) { return Secret(text_bytes("x")); };
        job.options.key_slot = slots;
        const auto changed = amend(job, {.stop = std::move(stop)});
        EXPECT_TRUE(bytes_of("disk.qcow2") == before);
        return changed ? Errc::io : changed.error().code;
    };
    EXPECT_EQ(change({.new_key = secret("")}), Errc::invalid_argument);
    EXPECT_EQ(change({.new_key = secret("n"), .iter_time_ms = 0}), Errc::invalid_argument);
    EXPECT_EQ(change({.new_key = secret("n"), .old_key = secret("x")}), Errc::invalid_argument);
    std::stop_source stop;
    stop.request_stop();
    EXPECT_EQ(change({.new_key = secret("n"), .iter_time_ms = 1}, stop.get_token()), Errc::cancelled);
    EXPECT_EQ(change({.slot = 0, .force = true}, stop.get_token()), Errc::cancelled);
    CreateOptions options{.size = 64 * KiB};
    options.encryption.emplace();
    options.encryption->key = secret("");
    EXPECT_EQ(create_luks_image(memory_storage(), options).error().code, Errc::invalid_argument);
    options.encryption->key = secret("x");
    options.encryption->iter_time_ms = 0;
    EXPECT_EQ(create_luks_image(memory_storage(), options).error().code, Errc::invalid_argument);
}

/// All layers together may take as long as one image, and nobody is asked for a key before that is known.
TEST_F(KeySlotsTest, TheTimeOfAChainIsBounded) {
    make_qcow2("base.qcow2");
    must_tool({"create", "-q", "--key", "key", "-b", "base.qcow2", "-F", "qcow2", "-o",
               "encrypt.format=luks,encrypt.iter-time=10", "top.qcow2"});
    const auto seconds = [&](const std::string& name) {
        const auto storage = must(open_file(directory_.file(name)));
        return must(luks::key_seconds({*storage, {luks_at(name)}, must(storage->size())}));
    };
    unsigned asked = 0;
    const auto open_chain = [&](double allowed) {
        return open_image(ImageSpec{.location = {.path = directory_.file("top.qcow2")},
                                    .keys =
                                        [&](const KeyRequest&) {
                                            ++asked;
                                            return Secret(text_bytes("x"));
                                        },
                                    .max_kdf_seconds = allowed});
    };
    const auto base = seconds("base.qcow2");
    const auto top = seconds("top.qcow2");
    const auto refused = open_chain(std::max(base, top) * 1.01);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().code, Errc::limit_exceeded);
    EXPECT_THAT(refused.error().message(), HasSubstr("base.qcow2"));
    EXPECT_EQ(asked, 0U);
    EXPECT_TRUE(open_chain((base + top) * 1.01));
    EXPECT_EQ(asked, 2U);
}

TEST_F(KeySlotsTest, QemuChangesThemToo) {
    make_qcow2("disk.qcow2");
    Finished amended;
    for (int i = 0; i < 30; ++i) {
        amended = qemu_img(
            {"amend", "--object", secret_option, "--object", "secret,id=n,data=new", "--image-opts",
             opened("qcow2", "disk.qcow2"), "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10"},
            directory_.path());
        if (amended.err.find("CPU usage") == std::string::npos) break;
    }
    ASSERT_EQ(amended.status, 0) << amended.text();
    EXPECT_EQ(tool({"compare", "--object", "secret,id=n,data=new", "-F", "raw", "disk.qcow2", "disk.raw"}).status, 0);
}

/// Any bytes of a header, with the right key.
TEST(HostileLuksTest, MutatedHeaders) {
    auto random = Random::named("luks headers");
    SCOPED_TRACE(replay_hint());
    CreateOptions options{.size = 64 * KiB};
    options.encryption.emplace();
    options.encryption->key = std::make_shared<const Secret>(text_bytes("x"));
    options.encryption->cipher = "aes-128";
    options.encryption->iter_time_ms = 1;
    const auto whole = memory_storage();
    must(create_luks_image(whole, options));
    Bytes bytes(must(whole->size()));
    must(whole->read({0}, bytes));
    unsigned opened = 0;
    for (int i = 0; i < 400; ++i) {
        auto mutated = bytes;
        for (std::uint64_t n = random.between(1, 3); n > 0; --n) {
            // Mostly in what the first key slot needs.
            const auto at = random.chance(70) ? random.below(256) : random.below(format::luks1_header_bytes);
            mutated[at] = static_cast<std::byte>(random.chance(50) ? random.below(256) : 0xff * random.below(2));
        }
        const KeySource key = [](const KeyRequest&) { return Secret(text_bytes("x")); };
        const auto image = open_image(memory_storage(mutated),
                                      {.writable = true, .format = Format::luks, .keys = key, .max_kdf_seconds = 0.05});
        if (!image) {
            EXPECT_FALSE(image.error().what.empty());
            continue;
        }
        ++opened;
        Bytes sector(512);
        if ((*image)->size() >= sector.size()) must((*image)->read({0}, sector));
    }
    EXPECT_GT(opened, 0U);
    EXPECT_LT(opened, 400U);
}

}  // namespace
}  // namespace qcow::test
