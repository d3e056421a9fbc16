// Changes of the key slots of LUKS1, and headers that are hostile.

#include <algorithm>
#include <map>

#include "base/endian.h"
#include "crypto/encryption_fixture.h"
#include "format/header.h"
#include "format/luks.h"
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
        expect_refusal(amend({}, "encrypt.state=inactive,encrypt.keyslot=5"), HasSubstr("not in use"));
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
