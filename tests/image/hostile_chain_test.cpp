// Chains without end, and names that lead where they must not.

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>

#include <filesystem>

#include "fuzz/image_builder.h"
#include "hostile.h"

namespace qcow::hostile {
namespace {

using ::testing::AnyOf;
using ::testing::HasSubstr;

// Chains.

void run_on_small_stack(std::function<void()> work) {
    pthread_attr_t attributes;
    ASSERT_EQ(pthread_attr_init(&attributes), 0);
    ASSERT_EQ(pthread_attr_setstacksize(&attributes, 256 * KiB * fatness), 0);
    pthread_t thread = {};
    const auto start = [](void* given) -> void* {
        (*static_cast<std::function<void()>*>(given))();
        return nullptr;
    };
    ASSERT_EQ(pthread_create(&thread, &attributes, start, &work), 0);
    pthread_join(thread, nullptr);
    pthread_attr_destroy(&attributes);
}

TEST_F(Hostile, BackingLoops) {
    write("self", overlay("self"));
    write("a", overlay("b"));
    write("b", overlay("a"));
    write("link", overlay("other/../alias"));
    std::filesystem::create_directory(path("other"));
    std::filesystem::create_symlink("link", path("alias"));
    std::filesystem::create_hard_link(path("self"), path("hard"));
    for (const auto* name : {"self", "a", "link", "hard"}) {
        const auto result = open_bounded(open(name), local_files());
        expect_error(result, Errc::corrupt, {"loop"});
    }
    // A data file that is the image itself.
    HostileImage image(9);
    image.incompatible = 4;
    image.extensions.push_back({0x44415441, {}});
    append(image.extensions.back().data, "data");
    image.size = 4096;
    write("data", image.finish());
    expect_error(open_bounded(open("data"), local_files()), Errc::corrupt, {"twice"});
}

TEST_F(Hostile, LongChains) {
    HostileImage base(9);
    base.size = 4096;
    base.file.write_word(base.cluster(3), base.cluster(4));
    base.file.write_word(base.cluster(4) + 8, base.cluster(5));
    base.file.write(base.cluster(5), Bytes(512, std::byte{0x77}));
    write("layer0", base.finish(6));
    for (int i = 1; i <= 4096; ++i) write("layer" + std::to_string(i), overlay("layer" + std::to_string(i - 1)));
    rlimit before = {};
    ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
    const auto limit_open_files = [&](rlim_t most) {
        const rlimit limit{most, before.rlim_max};
        return setrlimit(RLIMIT_NOFILE, &limit) == 0;
    };

    // A sanitizer needs a file descriptor of its own to look at an address, and takes its lack for a wrong object.
    if (!test::sanitized) {
        ASSERT_TRUE(limit_open_files(100));
        expect_error(open_image(open("layer200"), options_for(Format::qcow2, local_files())), Errc::limit_exceeded,
                     {"backing file of", "files open", "ulimit -n"});
    }
    if (!limit_open_files(4200)) GTEST_SKIP() << "this system does not let a process have so many files open";
    expect_error(open_image(open("layer4096"), options_for(Format::qcow2, local_files())), Errc::limit_exceeded,
                 {"4096"});

    // With all that is done to it, on a stack that is no larger than those of threads on small systems.
    run_on_small_stack([&] {
        auto works = open_image(open("layer4095"), options_for(Format::qcow2, local_files()));
        ASSERT_TRUE(works.has_value()) << works.error().message();
        Bytes bytes(512);
        ASSERT_TRUE((*works)->read({512}, bytes).has_value());
        EXPECT_EQ(bytes, Bytes(512, std::byte{0x77}));
        EXPECT_EQ((*works)->extent({512}, 512)->depth, 4095U);
        // What is left of the chain when its upper half goes.
        auto half = *works;
        for (int i = 0; i < 2000; ++i) half = half->backing();
        works->reset();
        ASSERT_TRUE(half->read({512}, bytes).has_value());
        EXPECT_EQ(half->extent({512}, 512)->depth, 2095U);
    });
    setrlimit(RLIMIT_NOFILE, &before);
}

// Names.

/// Opens an overlay of this backing name, and says which paths the gate was asked for.
std::vector<std::string> asked_for(const fuzz::SparseFile& overlay, Error& error) {
    std::vector<std::string> paths;
    const auto gate = [&](const FileReference& reference) -> Result<std::shared_ptr<Storage>> {
        paths.push_back(reference.location.path);
        return no_files()(reference);
    };
    const auto result = open_image(fuzz::storage_of(overlay, "images/top"), options_for(Format::qcow2, gate));
    EXPECT_FALSE(result.has_value());
    if (!result) {
        expect_good_message(result.error());
        error = result.error();
    }
    return paths;
}

TEST_F(Hostile, NothingIsOpenedThatTheGateDoesNotOpen) {
    for (const std::string name : {"/etc/shadow", "../../x", "x", "file:/etc/shadow"}) {
        expect_error(open_image(fuzz::storage_of(overlay(name), "top"), options_for(Format::qcow2)),
                     Errc::refused_by_policy, {"top", name.substr(name.size() - 1)});
    }
    Error error;
    EXPECT_EQ(asked_for(overlay("/etc/shadow"), error), std::vector<std::string>{"/etc/shadow"});
    EXPECT_EQ(asked_for(overlay("../../x"), error), std::vector<std::string>{"images/../../x"});
    EXPECT_EQ(asked_for(overlay("file:x"), error), std::vector<std::string>{"images/x"});
    EXPECT_EQ(asked_for(overlay(R"(json:{"driver":"qcow2","file":{"driver":"file","filename":"/etc/shadow"}})"), error),
              std::vector<std::string>{"/etc/shadow"});
    EXPECT_EQ(error.code, Errc::refused_by_policy);
}

TEST_F(Hostile, NamesThatAreNoPathsNeverReachTheGate) {
    const std::string zero("a\0b", 3);
    for (const std::string& name :
         {std::string("nbd:localhost:10809"), std::string("nbd://host/export"), std::string("https://host/x"),
          std::string("fd:3"), std::string("ssh://host/x"), std::string("json:"), std::string("json:[]"),
          std::string("json:{}"), std::string("json:nul"), std::string(R"(json:{"driver":"nbd","host":"h"})"),
          std::string(R"(json:{"driver":"qcow2","file":{"driver":"http","filename":"x"}})"),
          std::string(R"(json:{"driver":"raw","offset":512,"file":{"driver":"file","filename":"x"}})"),
          std::string(R"(json:{"driver":"qcow2","file":"node"})"),
          std::string(R"(json:{"driver":"file","filename":"a\u0000b"})"),
          std::string(R"(json:{"driver":"qcow2","backing":{"driver":"file","filename":"y"},"file.filename":"x"})"),
          zero, "json:" + std::string(1000, '['), std::string("file:")}) {
        Error error;
        EXPECT_TRUE(asked_for(overlay(name), error).empty()) << name;
        EXPECT_THAT(error.code, AnyOf(Errc::corrupt, Errc::unsupported)) << name;
    }
    Error error;
    EXPECT_TRUE(asked_for(overlay("x", "nbd"), error).empty());
    EXPECT_EQ(error.code, Errc::unsupported);
}

/// Parsing a description must not be as deep as it likes, nor a name as long as a cluster.
TEST_F(Hostile, DeeplyNestedDescription) {
    for (const auto& [depth, closed] : {std::pair{2000, true}, {4000, false}, {900'000, true}, {900'000, false}}) {
        HostileImage image(21);
        image.incompatible = 4;
        std::string name = R"(json:{"x":)" + std::string(static_cast<std::size_t>(depth), '[');
        if (closed) name += std::string(static_cast<std::size_t>(depth), ']') + "}";
        image.extensions.push_back({0x44415441, {}});
        append(image.extensions.back().data, name);
        Error error;
        EXPECT_TRUE(asked_for(image.finish(), error).empty());
        if (depth > 4096)
            EXPECT_EQ(error.code, Errc::limit_exceeded);
        else
            EXPECT_THAT(error.code, AnyOf(Errc::corrupt, Errc::unsupported));
    }
}

TEST_F(Hostile, BackingFilesThatAreNoFiles) {
    ASSERT_EQ(::mkfifo(path("fifo").c_str(), 0600), 0);
    std::filesystem::create_directory(path("directory"));
    for (const std::string name : {"fifo", "directory", "/dev/null", "/dev/zero", "/dev/stdin"}) {
        write("top", overlay(name, "raw"));
        const auto result = open_bounded(open("top"), local_files());
        ASSERT_FALSE(result.has_value()) << name;
        expect_good_message(result.error());
        EXPECT_THAT(result.error().message(), HasSubstr("backing file of"));
    }
}

/// What a guest has written to a raw disk may look like an image that names other files.
TEST_F(Hostile, GuessedFormatsNameNoFurtherFiles) {
    write("secret", HostileImage(9).finish());
    write("guest", overlay("secret"));
    write("top", overlay("guest", ""));
    expect_error(open_bounded(open("top"), local_files()), Errc::refused_by_policy, {"guest", "secret", "format"});
    HostileImage data(9);
    data.size = 4096;
    data.incompatible = 4;
    data.extensions.push_back({0x44415441, {}});
    append(data.extensions.back().data, "secret");
    write("guest", data.finish());
    expect_error(open_bounded(open("top"), local_files()), Errc::refused_by_policy, {"guest", "secret"});
    // Where the overlay says that it is raw, it is.
    write("top", overlay("guest", "raw"));
    EXPECT_TRUE(open_bounded(open("top"), local_files()).has_value());
}

/// Without its data file the places in it mean nothing.
TEST_F(Hostile, ExternalDataFileThatWasNotOpened) {
    HostileImage image;
    image.incompatible = 4;
    image.extensions.push_back({0x44415441, {}});
    append(image.extensions.back().data, "data");
    image.file.write_word(image.cluster(3), image.cluster(4) | format::copied_bit);
    image.file.write_word(image.cluster(4), format::copied_bit);
    auto options = options_for(Format::qcow2);
    options.follow = false;
    const auto opened = open_image(fuzz::storage_of(image.finish(5), "image"), options);
    ASSERT_TRUE(opened.has_value());
    const auto extent = (*opened)->extent({0}, 512);
    ASSERT_TRUE(extent.has_value());
    EXPECT_EQ(extent->kind, Extent::Kind::data);
    EXPECT_EQ(extent->host.has_value(), extent->storage != nullptr);
    std::byte one = {};
    expect_error((*opened)->read({0}, {&one, 1}), Errc::not_found, {"data file"});
}

}  // namespace
}  // namespace qcow::hostile
