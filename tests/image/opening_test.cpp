// How the library opens images: what is told of a file's contents, and what may lie below an image instead of what its
// header names.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "qcow/create.h"
#include "support/memory_files.h"
#include "support/result.h"

namespace qcow::test {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr std::uint64_t opened_bytes = 1 << 20;

std::shared_ptr<Storage> raw_disk(std::uint8_t fill, const std::string& name = "disk.raw") {
    return memory_storage(repeated(opened_bytes, fill), name);
}

std::shared_ptr<Storage> overlay(const std::string& backing, const std::string& format = "raw") {
    auto storage = memory_storage({}, "top");
    CreateOptions options;
    options.size = opened_bytes;
    options.backing_name = backing;
    options.backing_format = format;
    must(create_image({storage, nullptr}, options));
    return storage;
}

class Opened : public testing::Test {
protected:
    Result<std::shared_ptr<Image>> open(std::shared_ptr<Storage> storage, OpenOptions options = {}) {
        warnings_.clear();
        options.warn = [this](const std::string& warning) { warnings_.push_back(warning); };
        return open_image(std::move(storage), options);
    }

    static std::byte first_byte(Image& image) {
        std::byte byte = {};
        must(image.read({0}, {&byte, 1}));
        return byte;
    }

    std::vector<std::string> warnings_;
};

TEST_F(Opened, WhatIsNoRawDisk) {
    auto gzip = repeated(opened_bytes, 7);
    gzip = with(gzip, 0, bytes({0x1f, 0x8b, 0x08}));
    const auto file = memory_storage(gzip, "disk.img.gz");
    EXPECT_TRUE(fails(open(file), Errc::unsupported, {"disk.img.gz", "gzip", "gunzip -c disk.img.gz > disk.img"}));
    EXPECT_TRUE(fails(open(file, {.follow = false}), Errc::unsupported, {"gzip"}));
    EXPECT_TRUE(fails(open(file, {.writable = true}), Errc::unsupported, {"gzip"}));
    EXPECT_EQ(must(open(file, {.format = Format::raw}))->size(), opened_bytes);
    // Said to be something that it is not.
    EXPECT_TRUE(fails(open(file, {.format = Format::qcow2}), Errc::corrupt, {"not a qcow2 image", "gzip"}));
    // A layer of which no format is recorded, and one of which it is.
    EXPECT_TRUE(fails(open(overlay("disk.img.gz", ""), {.gate = gate_to({{"disk.img.gz", file}})}), Errc::unsupported,
                      {"gzip", "--backing-format raw"}));
    EXPECT_TRUE(open(overlay("disk.img.gz"), {.gate = gate_to({{"disk.img.gz", file}})}).has_value());
}

TEST_F(Opened, NamesThatPromiseQcow2) {
    EXPECT_TRUE(fails(open(raw_disk(7, "a.qcow2")), Errc::unsupported, {"a.qcow2", "no qcow2 header"}));
    EXPECT_TRUE(open(raw_disk(7, "a.qcow2"), {.format = Format::raw}).has_value());
    EXPECT_THAT(warnings_, IsEmpty());
    EXPECT_EQ(must(open(raw_disk(0, "a.qcow2")))->format(), Format::raw);
    EXPECT_THAT(warnings_, ElementsAre(HasSubstr("no qcow2 header")));
    EXPECT_EQ(must(open(raw_disk(7, "a.img")))->format(), Format::raw);
    EXPECT_THAT(warnings_, IsEmpty());
}

TEST_F(Opened, AnotherBackingFile) {
    const auto image = must(open(overlay("gone"), {.backing = raw_disk(7)}));
    EXPECT_EQ(first_byte(*image), std::byte{7});
    EXPECT_EQ(image->backing()->files(), std::vector<std::string>{"disk.raw"});
    EXPECT_EQ(must(image->info()).backing->name, "gone");
    EXPECT_THAT(warnings_, IsEmpty());
    // It may name files in turn, which pass the gate.
    const auto middle = overlay("bottom");
    const auto gate = gate_to({{"bottom", raw_disk(9)}});
    EXPECT_EQ(first_byte(*must(open(overlay("gone", ""), {.backing = middle, .gate = gate}))), std::byte{9});
    EXPECT_TRUE(fails(open(overlay("gone", ""), {.backing = middle}), Errc::refused_by_policy, {"bottom"}));
    // Writing is done to the image, over the backing file that was given.
    const auto top = overlay("gone");
    const auto written = must(open(top, {.writable = true, .backing = raw_disk(7)}));
    const std::byte five{5};
    must(written->write({1}, {&five, 1}));
    must(written->close());
    EXPECT_EQ(first_byte(*must(open(top, {.backing = raw_disk(8)}))), std::byte{7}) << "copied with its cluster";
}

TEST_F(Opened, NoBackingFile) {
    const auto image = must(open(overlay("gone"), {.backing = nullptr}));
    EXPECT_EQ(first_byte(*image), std::byte{0});
    EXPECT_EQ(image->backing(), nullptr);
    EXPECT_EQ(must(image->extent({0}, opened_bytes)).kind, Extent::Kind::unallocated);
    EXPECT_THAT(warnings_, ElementsAre(testing::AllOf(HasSubstr("gone"), HasSubstr("ZEROS"))));
    EXPECT_TRUE(fails(open(overlay("gone"), {.writable = true, .backing = nullptr}), Errc::invalid_argument, {"top"}));
    // Where there is none anyway, nothing is left out.
    EXPECT_TRUE(open(overlay("", ""), {.writable = true, .backing = nullptr}).has_value());
    EXPECT_THAT(warnings_, IsEmpty());
    EXPECT_TRUE(open(raw_disk(1), {.backing = nullptr}).has_value());
    EXPECT_TRUE(fails(open(raw_disk(1), {.backing = raw_disk(2)}), Errc::invalid_argument, {"no backing file"}));
}

TEST_F(Opened, TheFormatOfTheBackingFile) {
    const auto inner = overlay("", "");
    const auto gate = gate_to({{"base", inner}});
    const auto opened = [&](const std::string& recorded, OpenOptions options) {
        options.gate = gate;
        return must(open(overlay("base", recorded), options))->backing()->format();
    };
    EXPECT_EQ(opened("raw", {}), Format::raw);
    EXPECT_EQ(opened("", {}), Format::qcow2);
    EXPECT_EQ(opened("raw", {.backing_format = Format::qcow2}), Format::qcow2);
    EXPECT_EQ(opened("", {.backing_format = Format::raw}), Format::raw);
    EXPECT_EQ(opened("raw", {.backing = inner}), Format::raw);
    EXPECT_EQ(opened("", {.backing = inner}), Format::qcow2);
    EXPECT_EQ(opened("raw", {.backing = inner, .backing_format = Format::qcow2}), Format::qcow2);
}

}  // namespace
}  // namespace qcow::test
