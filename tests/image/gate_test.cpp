// What becomes of the files that images name, under each of the gates.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "support/named_files.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using Role = FileReference::Role;

class Gates : public testing::Test {
protected:
    [[nodiscard]] Result<std::shared_ptr<Image>> open(const std::string& path, Gate gate, bool writable = false,
                                                      std::optional<Format> format = Format::qcow2) const {
        auto storage = open_file(path, {.writable = writable});
        if (!storage) return std::unexpected(storage.error());
        OpenOptions options;
        options.writable = writable;
        options.format = format;
        options.gate = std::move(gate);
        return open_image(*storage, options);
    }

    [[nodiscard]] Gate beneath() const { return files_beneath(files_.images().string()); }

    /// Whether an image that names it is opened, or not, as it is to be.
    void expect_granted(const NamedFile& file, Role role, bool writable, bool untrusted) const {
        SCOPED_TRACE(fmt::format("{} \"{}\"{}{}", role == Role::backing_file ? "backing file" : "data file", file.name,
                                 writable ? ", writable" : "", untrusted ? ", untrusted" : ""));
        const auto top = files_.make_image("top", role, file.name);
        const auto opened = open(top, untrusted ? beneath() : local_files(), writable);
        switch (untrusted ? file.untrusted : file.trusted) {
            using enum Granted;
            case yes: EXPECT_TRUE(opened.has_value()) << opened.error().message(); break;
            case no_regular_file:
                EXPECT_TRUE(fails(opened, untrusted ? Errc::refused_by_policy : Errc::invalid_argument, {top}));
                break;
            case leads_out:
                EXPECT_TRUE(fails(opened, Errc::refused_by_policy, {top, "outside", files_.images().string()}));
                break;
            case absolute: EXPECT_TRUE(fails(opened, Errc::refused_by_policy, {top, "absolute path"})); break;
            case described: EXPECT_TRUE(fails(opened, Errc::refused_by_policy, {top, "json:"})); break;
            case scheme:
                if (role == Role::data_file && file.name.find("//") == std::string::npos) {
                    EXPECT_TRUE(fails(opened, Errc::not_found, {top, file.name}));  // a path, there
                } else {
                    EXPECT_TRUE(fails(opened, Errc::unsupported, {top, file.name, "scheme"}));
                }
                break;
            case missing: EXPECT_TRUE(fails(opened, Errc::not_found, {top})); break;
        }
    }

    NamedFiles files_;
};

TEST_F(Gates, WhatIsOpened) {
    for (const auto& file : files_.all())
        for (const auto role : {Role::backing_file, Role::data_file})
            for (const bool writable : {false, true})
                for (const bool untrusted : {false, true}) expect_granted(file, role, writable, untrusted);
    EXPECT_TRUE(files_.is_outside_untouched());
}

TEST_F(Gates, WhatIsOpenedIsWhatWasNamed) {
    std::byte first = {};
    for (const auto& [name, content] :
         {std::pair{"base", 'b'}, {"linked-sub/../base", 'b'}, {"linked-sub/base", 's'}}) {
        const auto image = value_of(open(files_.make_image("top", Role::backing_file, name), beneath()));
        value_of(image->read({0}, {&first, 1}));
        EXPECT_EQ(static_cast<char>(first), content) << name;
    }
    // A data file that is written.
    const auto image = value_of(open(files_.make_image("top", Role::data_file, "sub/base"), beneath(), true));
    first = std::byte{'W'};
    value_of(image->write({0}, {&first, 1}));
    value_of(image->close());
    EXPECT_EQ(file_bytes(files_.images() / "sub" / "base")[0], 'W');
}

/// To open something may have effects. Here: somebody who waits for the other end of the FIFO would go on.
TEST_F(Gates, WhatIsNoRegularFileIsNotEvenOpened) {
    std::atomic<bool> met = false;
    std::thread writer([&, fifo = (files_.images() / "fifo").string()] {
        close(::open(fifo.c_str(), O_WRONLY | O_CLOEXEC));
        met = true;
    });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    for (const auto role : {Role::backing_file, Role::data_file}) {
        for (const bool writable : {false, true}) {
            const auto top = files_.make_image("top", role, "fifo");
            EXPECT_FALSE(open(top, local_files(), writable).has_value());
            EXPECT_FALSE(open(top, beneath(), writable).has_value());
        }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    EXPECT_FALSE(met);
    const int reader = ::open((files_.images() / "fifo").c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC);
    writer.join();
    close(reader);
}

/// Names are seen from the layer that has them, but must stay beneath the directory of the topmost.
TEST_F(Gates, LayersBelow) {
    const auto top = files_.make_image("top", Role::backing_file, "sub/middle", "qcow2");
    for (const auto role : {Role::backing_file, Role::data_file}) {
        files_.make_image("sub/middle", role, "../base");
        EXPECT_TRUE(open(top, beneath()).has_value());
        for (const std::string name : {"../../outside", "../link-out", "../linked-parent/outside"}) {
            files_.make_image("sub/middle", role, name);
            EXPECT_TRUE(open(top, local_files()).has_value());
            EXPECT_TRUE(fails(open(top, beneath()), Errc::refused_by_policy, {"sub/middle", "outside"})) << name;
        }
        for (const std::string& name : {files_.outside().string(), std::string(R"(json:{"filename":"../base"})")}) {
            files_.make_image("sub/middle", role, name);
            EXPECT_TRUE(fails(open(top, beneath()), Errc::refused_by_policy, {"sub/middle"})) << name;
        }
        files_.make_image("sub/middle", role, "../fifo");
        EXPECT_TRUE(fails(open(top, beneath()), Errc::refused_by_policy, {"not a regular file"}));
    }
}

/// However the caller writes the directory.
TEST_F(Gates, SpellingsOfTheDirectory) {
    const auto before = std::filesystem::current_path();
    const auto try_from = [&](const std::filesystem::path& working, const std::string& directory,
                              const std::string& top) {
        std::filesystem::current_path(working);
        files_.make_image("top", Role::backing_file, "sub/../base");
        EXPECT_TRUE(open(top, files_beneath(directory)).has_value()) << directory;
        files_.make_image("top", Role::backing_file, "../outside");
        EXPECT_TRUE(fails(open(top, files_beneath(directory)), Errc::refused_by_policy, {"outside"})) << directory;
        std::filesystem::current_path(before);
    };
    const auto absolute = files_.images().string();
    try_from(files_.images(), "", "top");
    try_from(files_.images(), ".", "./top");
    try_from(files_.images() / "sub", "..", "../top");
    try_from(files_.images().parent_path(), "images", "images/top");
    try_from(files_.images().parent_path(), "images", "images//top");
    try_from("/", absolute, absolute + "/top");
    try_from("/", absolute + "/", absolute + "/top");
    try_from("/", absolute.substr(1), absolute.substr(1) + "/top");
    // Where the image does not lie beneath it, nothing that it names does.
    files_.make_image("top", Role::backing_file, "base");
    EXPECT_FALSE(open(absolute + "/top", files_beneath("images")).has_value());
    EXPECT_FALSE(open(absolute + "/top", files_beneath(absolute + "/sub")).has_value());
    EXPECT_TRUE(fails(open(absolute + "/top", files_beneath(absolute + "/missing")), Errc::not_found, {"missing"}));
}

/// A guest that owns a raw disk can write a header into it.
TEST_F(Gates, WhatWasGuessedToBeAnImageNamesNothing) {
    for (const auto role : {Role::backing_file, Role::data_file}) {
        const auto top = files_.make_image("top", role, "base");
        EXPECT_TRUE(open(top, local_files(), false, std::nullopt).has_value());
        EXPECT_TRUE(fails(open(top, beneath(), false, std::nullopt), Errc::refused_by_policy, {top, "guessed"}));
    }
    // By itself it is read.
    const auto alone = files_.make_image("alone", Role::backing_file, "");
    EXPECT_TRUE(open(alone, beneath(), false, std::nullopt).has_value());
}

/// What is looked at is what is opened, although its name leads somewhere else every moment.
TEST_F(Gates, NamesThatChangeMeanwhile) {
    namespace fs = std::filesystem;
    const auto top = files_.make_image("top", Role::backing_file, "changing/base");
    fs::create_directory(files_.images() / "sub2");
    put_file(files_.images() / "sub2" / "base", std::string(named_size, 's'));
    put_file(files_.outside().parent_path() / "base", std::string(named_size, 'o'));
    std::atomic<bool> stop = false;
    std::thread changer([&] {
        for (int i = 0; !stop; ++i) {
            fs::remove(files_.images() / "next");
            const char* const targets[] = {"sub", "..", "sub2"};
            fs::create_symlink(targets[i % 3], files_.images() / "next");
            fs::rename(files_.images() / "next", files_.images() / "changing");
        }
    });
    // However slowly the names change: until many were opened and many refused.
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::minutes(1);
    int opened = 0;
    int refused = 0;
    while ((opened < 300 || refused < 100) && !HasFailure() && std::chrono::steady_clock::now() < deadline) {
        const auto image = open(top, beneath());
        if (!image) {
            ++refused;
            continue;
        }
        ++opened;
        std::byte first = {};
        value_of((*image)->read({0}, {&first, 1}));
        EXPECT_EQ(static_cast<char>(first), 's');
    }
    stop = true;
    changer.join();
    EXPECT_GE(opened, 300);
    EXPECT_GE(refused, 100);
}

}  // namespace
}  // namespace qcow::test
