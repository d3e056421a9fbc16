#include "format/file_name.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "support/result.h"

namespace qcow::format {
namespace {

using test::fails;
using test::must;
using namespace std::string_view_literals;

std::string path_of(std::string_view name) { return must(parse_file_name(name)).path; }
std::optional<Format> format_of(std::string_view name) { return must(parse_file_name(name)).format; }

// ---- Paths ----

TEST(FileName, IsAPath) {
    EXPECT_EQ(path_of("base.qcow2"), "base.qcow2");
    EXPECT_EQ(path_of("../images/base.qcow2"), "../images/base.qcow2");
    EXPECT_EQ(path_of("/srv/base.qcow2"), "/srv/base.qcow2");
    EXPECT_EQ(format_of("base.qcow2"), std::nullopt);
}

TEST(FileName, IsTakenByteForByte) {
    EXPECT_EQ(path_of(" a name\nwith \xff anything "), " a name\nwith \xff anything ");
}

TEST(FileName, AColonAfterASlashIsPartOfThePath) {
    EXPECT_EQ(path_of("./nbd:disk"), "./nbd:disk");
    EXPECT_EQ(path_of("/srv/a:b"), "/srv/a:b");
    EXPECT_EQ(path_of("snapshots/12:00.img"), "snapshots/12:00.img");
}

TEST(FileName, FilePrefixIsTakenOff) {
    EXPECT_EQ(path_of("file:base.img"), "base.img");
    EXPECT_EQ(path_of("file:/srv/base.img"), "/srv/base.img");
    // Once: it is how a name with a colon is written.
    EXPECT_EQ(path_of("file:nbd:disk"), "nbd:disk");
    EXPECT_EQ(path_of("file:json:{}"), "json:{}");
    EXPECT_EQ(format_of("file:base.img"), std::nullopt);
}

TEST(FileName, MustNotBeEmpty) {
    EXPECT_TRUE(fails(parse_file_name(""), Errc::corrupt, {"the name is empty"}));
    EXPECT_TRUE(fails(parse_file_name("file:"), Errc::corrupt, {"the name is empty"}));
}

TEST(FileName, HasNoZeroByte) {
    // The operating system would open "public" instead.
    EXPECT_TRUE(fails(parse_file_name("public\0/secret"sv), Errc::corrupt, {"zero byte"}));
    EXPECT_TRUE(fails(parse_file_name("file:public\0/secret"sv), Errc::corrupt, {"zero byte"}));
    EXPECT_TRUE(
        fails(parse_file_name(R"(json:{"driver":"file","filename":"a\u0000b"})"), Errc::corrupt, {"zero byte"}));
}

TEST(FileName, OtherSchemesAreRefusedByName) {
    EXPECT_TRUE(fails(parse_file_name("nbd:localhost:10809"), Errc::unsupported,
                      {"\"nbd:localhost:10809\"", "scheme \"nbd:\"", "\"./nbd:localhost:10809\""}));
    EXPECT_TRUE(fails(parse_file_name("nbd://host/export"), Errc::unsupported, {"scheme \"nbd:\""}));
    EXPECT_TRUE(fails(parse_file_name("https://host/disk.img"), Errc::unsupported, {"scheme \"https:\""}));
    EXPECT_TRUE(fails(parse_file_name("rbd:pool/image"), Errc::unsupported, {"scheme \"rbd:\""}));
    EXPECT_TRUE(fails(parse_file_name("fat:rw:/etc"), Errc::unsupported, {"scheme \"fat:\""}));
    EXPECT_TRUE(fails(parse_file_name("JSON:{}"), Errc::unsupported, {"scheme \"JSON:\""}));
}

TEST(FileName, PathsOfWindowsAreCalledThat) {
    for (const std::string_view name : {R"(C:\VMs\base.qcow2)", "C:/VMs/base.qcow2", "z:base.qcow2"}) {
        EXPECT_TRUE(fails(parse_file_name(name), Errc::unsupported, {name, "path of Windows"}));
        EXPECT_TRUE(is_windows_path(name));
    }
    for (const std::string_view name : {R"(\\server\share\base.qcow2)", R"(images\base.qcow2)"}) {
        EXPECT_EQ(path_of(name), name);  // there may be such a file
        EXPECT_TRUE(is_windows_path(name));
    }
    for (const std::string_view name : {"base.qcow2", "/srv/a\\b", "file:a", "./C:/x"})
        EXPECT_FALSE(is_windows_path(name)) << name;
}

TEST(FileName, OfADataFileIsAPath) {
    constexpr auto role = FileReference::Role::data_file;
    for (const std::string_view name : {"vm:data.raw", "nbd:localhost:10809", "C:/data.raw"})
        EXPECT_EQ(must(parse_file_name(name, role)).path, name);
    EXPECT_EQ(must(parse_file_name("file:data.raw", role)).path, "data.raw");
    EXPECT_TRUE(fails(parse_file_name("nbd://host/x", role), Errc::unsupported, {"scheme"}));
}

// ---- Names that people give ----

TEST(GivenName, AColonIsPartOfThePath) {
    for (const std::string_view name : {"vm:disk.qcow2", "nbd:localhost", "C:/x", "a", "/srv/a:b", "-"}) {
        EXPECT_EQ(must(parse_location(name)).path, name);
        // What an image records of it leads to the same file.
        const std::filesystem::path images = "/images";
        EXPECT_EQ((images / path_of(must(recorded_name(name)))).lexically_normal(), images / name);
    }
    EXPECT_EQ(must(recorded_name("vm:disk.qcow2")), "./vm:disk.qcow2");
    EXPECT_EQ(must(recorded_name("disks/vm:disk.qcow2")), "disks/vm:disk.qcow2");
}

TEST(GivenName, HasAPrefixOrADescription) {
    EXPECT_EQ(must(parse_location("file:vm:disk")).path, "vm:disk");
    const auto described = must(parse_location("json:{'driver':'qcow2','file.filename':'x'}", "images/top"));
    EXPECT_EQ(described.path, "images/x");
    EXPECT_EQ(described.format, Format::qcow2);
    EXPECT_EQ(must(recorded_name("file:a")), "a");
    EXPECT_EQ(must(recorded_name("file:vm:a")), "./vm:a");
    for (const std::string_view name : {"file:/a", "json:{'filename':'a'}", "base.qcow2", "nbd://host/export"})
        EXPECT_EQ(must(recorded_name(name)), name);
    EXPECT_EQ(must(parse_location("base", "images/top")).path, "images/base");
    EXPECT_EQ(must(parse_location("/base", "images/top")).path, "/base");
}

TEST(GivenName, IsRefused) {
    EXPECT_TRUE(fails(parse_location("nbd://host/export"), Errc::unsupported, {"scheme \"nbd:\""}));
    EXPECT_TRUE(fails(parse_location("https://host/a.img"), Errc::unsupported, {"scheme \"https:\""}));
    EXPECT_TRUE(fails(parse_location(""), Errc::invalid_argument, {"empty"}));
    EXPECT_TRUE(fails(parse_location("json:{"), Errc::invalid_argument, {"not a JSON object"}));
}

TEST(ShellWord, IsQuotedWhereItHasToBe) {
    EXPECT_EQ(shell_word("/srv/a-b_c:1.qcow2"), "/srv/a-b_c:1.qcow2");
    EXPECT_EQ(shell_word("my disk"), "'my disk'");
    EXPECT_EQ(shell_word("it's"), R"('it'\''s')");
    EXPECT_EQ(shell_word(""), "''");
}

// ---- Descriptions ----

TEST(JsonDescription, NestsAFormatAndAFile) {
    const auto name = R"(json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/srv/base.img"}})";
    EXPECT_EQ(path_of(name), "/srv/base.img");
    EXPECT_EQ(format_of(name), Format::qcow2);
}

TEST(JsonDescription, MayNameASecret) {
    const auto secret = [](const char* name) { return must(parse_file_name(name)).secret; };
    EXPECT_EQ(secret(R"(json:{"driver":"qcow2","encrypt.key-secret":"s","file.filename":"a"})"), "s");
    EXPECT_EQ(secret(R"(json:{"driver":"qcow2","encrypt":{"format":"luks","key-secret":"s"},"file.filename":"a"})"),
              "s");
    EXPECT_EQ(secret(R"(json:{"encrypt.key-secret":"s","file.filename":"a"})"), "s");
    EXPECT_EQ(secret(R"(json:{"driver":"luks","key-secret":"s","file.filename":"a"})"), "s");
    EXPECT_EQ(secret(R"(json:{"driver":"luks","file.filename":"a"})"), "");
    for (const auto* const name : {R"(json:{"driver":"qcow2","key-secret":"s","file.filename":"a"})",
                                   R"(json:{"driver":"luks","encrypt.key-secret":"s","file.filename":"a"})",
                                   R"(json:{"driver":"file","filename":"a","encrypt.key-secret":"s"})"})
        EXPECT_TRUE(fails(parse_file_name(name), Errc::unsupported, {"key-secret"}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver":"luks","key-secret":7,"file.filename":"a"})"), Errc::corrupt,
                      {"not a string"}));
}

TEST(JsonDescription, MayBeFlat) {
    const auto name = R"(json:{"driver": "raw", "file.driver": "file", "file.filename": "base.img"})";
    EXPECT_EQ(path_of(name), "base.img");
    EXPECT_EQ(format_of(name), Format::raw);
}

TEST(JsonDescription, MayHaveStringsInSingleQuotes) {
    EXPECT_EQ(path_of("json:{'driver':'raw','file':{'driver':'file','filename':'base.img'}}"), "base.img");
    EXPECT_EQ(format_of("json:{'driver':\"qcow2\",'file.filename':'base.img'}"), Format::qcow2);
    EXPECT_EQ(path_of(R"(json:{'filename':'a"b'})"), R"(a"b)");
    EXPECT_EQ(path_of(R"(json:{'filename':'a\'b'})"), "a'b");
    EXPECT_EQ(path_of(R"(json:{"filename":"a\'b'c"})"), "a'b'c");
    EXPECT_EQ(path_of(R"(json:{'filename':'a\\\"\u00e9'})"), "a\\\"\xc3\xa9");
    EXPECT_TRUE(fails(parse_file_name("json:{'filename':'a}"), Errc::corrupt, {"not a JSON object"}));
    EXPECT_TRUE(fails(parse_file_name("json:{'filename':'a\\"), Errc::corrupt, {"not a JSON object"}));
}

TEST(JsonDescription, MaySayThatThereIsNoBackingFile) {
    EXPECT_TRUE(must(parse_file_name(R"(json:{"driver": "qcow2", "backing": null, "file.filename": "a"})")).alone);
    EXPECT_FALSE(must(parse_file_name(R"(json:{"driver": "qcow2", "file.filename": "a"})")).alone);
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "qcow2", "backing": "b", "file.filename": "a"})"),
                      Errc::unsupported, {"option \"backing\""}));
}

TEST(JsonDescription, MayBeNestedAndFlatAtOnce) {
    EXPECT_EQ(path_of(R"(json:{"driver": "raw", "file": {"driver": "file"}, "file.filename": "base.img"})"),
              "base.img");
}

TEST(JsonDescription, MayLeaveTheFileDriverOut) {
    EXPECT_EQ(path_of(R"(json:{"driver": "qcow", "file": {"filename": "base.img"}})"), "base.img");
    EXPECT_EQ(format_of(R"(json:{"driver": "qcow", "file": {"filename": "base.img"}})"), Format::qcow);
}

TEST(JsonDescription, MayLeaveTheFormatOut) {
    EXPECT_EQ(path_of(R"(json:{"file": {"driver": "file", "filename": "base.img"}})"), "base.img");
    EXPECT_EQ(format_of(R"(json:{"file": {"driver": "file", "filename": "base.img"}})"), std::nullopt);
    EXPECT_EQ(path_of(R"(json:{"file.filename": "base.img"})"), "base.img");
}

TEST(JsonDescription, MayBeOfTheFileAlone) {
    EXPECT_EQ(path_of(R"(json:{"driver": "file", "filename": "base.img"})"), "base.img");
    EXPECT_EQ(format_of(R"(json:{"driver": "file", "filename": "base.img"})"), std::nullopt);
    EXPECT_EQ(path_of(R"(json:{"filename": "base.img"})"), "base.img");
    EXPECT_EQ(path_of(R"(json:{"driver": "host_device", "filename": "/dev/sdb"})"), "/dev/sdb");
}

TEST(JsonDescription, FilenameIsAPathWhateverItLooksLike) {
    EXPECT_EQ(path_of(R"(json:{"driver": "file", "filename": "nbd:disk"})"), "nbd:disk");
    EXPECT_EQ(path_of(R"(json:{"driver": "file", "filename": "\u00e9.img"})"), "\xc3\xa9.img");
}

TEST(JsonDescription, OptionsThatDoNotChangeTheContentsAreIgnored) {
    EXPECT_EQ(path_of(R"(json:{"driver": "qcow2", "read-only": true, "node-name": "base", "discard": "unmap",
                          "detect-zeroes": "on", "cache": {"direct": true}, "cache.no-flush": false,
                          "file": {"driver": "file", "filename": "base.img", "locking": "off", "aio": "io_uring",
                                   "auto-read-only": true, "drop-cache": true}})"),
              "base.img");
}

TEST(JsonDescription, OptionsOfTheFileStayInTheLocation) {
    const auto location = must(parse_file_name(R"(json:{"driver": "qcow2", "read-only": true,
        "file": {"driver": "host_device", "filename": "/dev/sdb", "locking": "off", "cache": {"direct": true}}})"));
    EXPECT_EQ(location.scheme, Scheme::file);
    EXPECT_EQ(location.options, (std::map<std::string, std::string>{{"locking", "off"}, {"cache.direct", "true"}}));
}

TEST(JsonDescription, OptionsThatMayChangeTheContentsAreRefusedByName) {
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "raw", "offset": 512, "file.filename": "base.img"})"),
                      Errc::unsupported, {"json: description: option \"offset\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "raw", "size": 512, "file.filename": "base.img"})"),
                      Errc::unsupported, {"option \"size\""}));
    EXPECT_TRUE(
        fails(parse_file_name(R"(json:{"driver": "qcow2", "file.filename": "a", "backing.file.filename": "b"})"),
              Errc::unsupported, {"option \"backing.file.filename\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"file": {"filename": "base.img", "offset": 512}})"), Errc::unsupported,
                      {"option \"offset\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"file.filename": "base.img", "file.size": 512})"), Errc::unsupported,
                      {"option \"size\""}));
}

TEST(JsonDescription, AnOptionIsKnownByItsWholeName) {
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "qcow2", "discard-no-unref": true, "file.filename": "a"})"),
                      Errc::unsupported, {"option \"discard-no-unref\""}));
}

TEST(JsonDescription, OtherDriversAreRefusedByName) {
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "vmdk", "file.filename": "a"})"), Errc::unsupported,
                      {"json: description: driver \"vmdk\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "nbd", "host": "localhost"})"), Errc::unsupported,
                      {"driver \"nbd\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "qcow2", "file": {"driver": "https", "url": "https://h/"}})"),
                      Errc::unsupported, {"driver \"https\""}));
    // A format over a format over a file: one level more than an image has.
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "qcow2", "file": {"driver": "raw", "file": {}}})"),
                      Errc::unsupported, {"driver \"raw\""}));
}

TEST(JsonDescription, NodeNamesMeanNothing) {
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "qcow2", "file": "node0"})"), Errc::unsupported,
                      {"refers to a node by name"}));
}

TEST(JsonDescription, MustBeAnObject) {
    EXPECT_TRUE(fails(parse_file_name("json:"), Errc::corrupt, {"not a JSON object"}));
    EXPECT_TRUE(fails(parse_file_name("json:[]"), Errc::corrupt, {"not a JSON object"}));
    EXPECT_TRUE(fails(parse_file_name("json:\"base.img\""), Errc::corrupt, {"not a JSON object"}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "file", )"), Errc::corrupt, {"not a JSON object"}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"filename": "a"} b)"), Errc::corrupt, {"not a JSON object"}));
    EXPECT_TRUE(fails(parse_file_name("json:{\"filename\": \"\xff\"}"), Errc::corrupt, {"not a JSON object"}));
}

TEST(JsonDescription, MustNameAFile) {
    EXPECT_TRUE(fails(parse_file_name("json:{}"), Errc::corrupt, {"no \"file\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "file"})"), Errc::corrupt, {"no \"filename\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "raw", "file": {}})"), Errc::corrupt, {"no \"filename\""}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "raw", "file.filename": ""})"), Errc::corrupt));
}

TEST(JsonDescription, ValuesHaveTheRightType) {
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": 5, "file.filename": "a"})"), Errc::corrupt,
                      {"\"driver\" is not a string"}));
    EXPECT_TRUE(
        fails(parse_file_name(R"(json:{"driver": "raw", "file": 5})"), Errc::corrupt, {"\"file\" is not an object"}));
    EXPECT_TRUE(fails(parse_file_name(R"(json:{"driver": "raw", "file": null})"), Errc::corrupt,
                      {"\"file\" is not an object"}));
    EXPECT_FALSE(parse_file_name(R"(json:{"driver": "raw", "file.filename": 5})"));
    EXPECT_FALSE(parse_file_name(R"(json:{"driver": "raw", "file": "node0", "file.filename": "a"})"));
}

TEST(JsonDescription, MayBeDeepWithoutHarm) {
    // As deep as the name of a backing file can be.
    const auto deep_file = "json:{\"file\":" + std::string(500, '[') + std::string(500, ']') + "}";
    EXPECT_TRUE(fails(parse_file_name(deep_file), Errc::corrupt, {"\"file\" is not an object"}));
}

// ---- Relative to what ----

TEST(Resolve, RelativeNamesAreSeenFromTheDirectoryOfTheNamingFile) {
    EXPECT_EQ(resolve("base.img", "/srv/images/overlay.qcow2"), "/srv/images/base.img");
    EXPECT_EQ(resolve("sub/base.img", "images/overlay.qcow2"), "images/sub/base.img");
    EXPECT_EQ(resolve("base.img", "overlay.qcow2"), "base.img");
    EXPECT_EQ(resolve("base.img", "/overlay.qcow2"), "/base.img");
}

TEST(Resolve, AbsoluteNamesStay) {
    EXPECT_EQ(resolve("/srv/base.img", "/home/overlay.qcow2"), "/srv/base.img");
    EXPECT_EQ(resolve("/srv/base.img", "overlay.qcow2"), "/srv/base.img");
}

TEST(Resolve, DoesNotNormalise) {
    // Where "images" is a symbolic link, "images/.." is not here.
    EXPECT_EQ(resolve("../base.img", "images/overlay.qcow2"), "images/../base.img");
    EXPECT_EQ(resolve("./base.img", "overlay.qcow2"), "./base.img");
}

TEST(FileName, LongerThanAHeaderCanHoldIsRefusedUnparsed) {
    const auto deep = "json:{\"file\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}";
    EXPECT_TRUE(fails(parse_file_name(deep), Errc::unsupported));
}

}  // namespace
}  // namespace qcow::format
