#include "format/foreign.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "support/random.h"

namespace qcow::format {
namespace {

using testing::HasSubstr;
using namespace std::string_literals;

constexpr std::size_t disk_bytes = 1 << 20;

std::optional<Foreign> recognise(const std::string& file, std::string_view path = "disk.img") {
    const auto bytes = std::as_bytes(std::span(file));
    return recognise_foreign(bytes.first(std::min(bytes.size(), foreign_head_bytes)),
                             bytes.last(std::min(bytes.size(), foreign_tail_bytes)), path);
}

std::string what(const std::string& file, std::string_view path = "disk.img") {
    const auto found = recognise(file, path);
    return found ? std::string(found->what) : "";
}

std::string remedy(const std::string& file, std::string_view path) { return recognise(file, path).value().remedy; }

/// A disk of noise with these bytes in it; from the end with a negative place.
std::string with(const std::string& bytes, std::ptrdiff_t at = 0) {
    std::string file(disk_bytes, 'n');
    const auto place = at < 0 ? disk_bytes - static_cast<std::size_t>(-at) : static_cast<std::size_t>(at);
    return file.replace(place, bytes.size(), bytes);
}

/// A boot record in front, with one partition that can be booted from.
std::string with_boot_record(std::string file) {
    std::fill_n(file.begin() + 446, 64, '\0');
    file[446] = '\x80';
    return file.replace(510, 2, "\x55\xaa");
}

const std::string vhd_footer = "conectix\0\0\0\2\0\1\0\0"s;

TEST(Foreign, DiskImagesOfOthers) {
    EXPECT_THAT(what(with("KDMV\1\0\0\0"s)), HasSubstr("VMDK"));
    EXPECT_THAT(what(with("COWD\1\0\0\0"s)), HasSubstr("VMDK"));
    EXPECT_THAT(what("# Disk DescriptorFile\nversion=1\n"), HasSubstr("VMDK"));
    EXPECT_THAT(what(with(vhd_footer)), HasSubstr("VHD"));
    EXPECT_THAT(what(with(vhd_footer, -512)), HasSubstr("VHD"));
    EXPECT_THAT(what(with(vhd_footer, -511)), HasSubstr("VHD"));
    EXPECT_THAT(what(with("vhdxfile")), HasSubstr("VHDX"));
    EXPECT_THAT(what(with("\x7f\x10\xda\xbe", 64)), HasSubstr("VDI"));
    EXPECT_THAT(what(with("QED\0"s)), HasSubstr("QED"));
    EXPECT_THAT(what(with("WithoutFreeSpace")), HasSubstr("Parallels"));
    EXPECT_THAT(what(with("WithouFreSpacExt")), HasSubstr("Parallels"));
    EXPECT_THAT(what(with("koly\0\0\0\4\0\0\2\0"s, -512)), HasSubstr("DMG"));
}

TEST(Foreign, EncryptedVolumes) {
    EXPECT_THAT(what(with("LUKS\xba\xbe\0\1"s)), HasSubstr("LUKS1"));
    EXPECT_THAT(what(with("LUKS\xba\xbe\0\2"s)), HasSubstr("LUKS2"));
    EXPECT_THAT(remedy(with("LUKS\xba\xbe\0\2"s), "/srv/volume"), HasSubstr("the format luks"));
}

TEST(Foreign, CompressedFiles) {
    EXPECT_THAT(what(with("\x1f\x8b\x08")), HasSubstr("gzip"));
    EXPECT_THAT(what(with("\xfd"
                          "7zXZ\0"s)),
                HasSubstr("xz"));
    EXPECT_THAT(what(with("\x28\xb5\x2f\xfd")), HasSubstr("zstd"));
    EXPECT_THAT(what(with("BZh91AY&SY")), HasSubstr("bzip2"));
    EXPECT_THAT(what(with("7z\xbc\xaf\x27\x1c")), HasSubstr("7z"));
    EXPECT_THAT(what(with("PK\3\4").replace(disk_bytes - 22, 22, "PK\5\6"s + std::string(18, '\0'))), HasSubstr("zip"));
}

TEST(Foreign, WhatDownloadsLeave) {
    for (const std::string page :
         {"<!DOCTYPE html>\n<html>", "<html><head>", "\n  <HTML>", "\xef\xbb\xbf<!doctype HTML>"})
        EXPECT_THAT(what(page, "disk.qcow2"), HasSubstr("web page"));
    for (const std::string error : {"<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code></Error>", "<Error><Code>"})
        EXPECT_THAT(what(error), HasSubstr("XML"));
    EXPECT_THAT(remedy("<html>", "a"), HasSubstr("download the image again"));
    const std::string pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n";
    EXPECT_THAT(what(pointer, "disk.qcow2"), HasSubstr("Git LFS"));
    EXPECT_THAT(remedy(pointer, "disk.qcow2"), HasSubstr("git lfs pull"));
}

TEST(Foreign, ArchivesByTheirNames) {
    const auto tar = with("ustar", 257);
    EXPECT_THAT(what(tar, "machine.OVA"), HasSubstr("OVA"));
    EXPECT_THAT(what(tar, "disk.tar"), HasSubstr("tar"));
    EXPECT_EQ(what(tar, "disk.raw"), "");  // a disk that is used as a tape
    EXPECT_EQ(what(with("PK\3\4"), "disk.raw"), "");
}

TEST(Foreign, RemediesAreWholeCommands) {
    EXPECT_THAT(remedy(with("KDMV\1\0\0\0"s), "a/my disk.vmdk"),
                HasSubstr("qemu-img convert -f vmdk -O qcow2 'a/my disk.vmdk' 'a/my disk.qcow2'"));
    EXPECT_THAT(remedy(with("KDMV\1\0\0\0"s), "a.qcow2"), HasSubstr(" a.qcow2 a.converted.qcow2"));
    EXPECT_THAT(remedy(with(vhd_footer, -512), "a.vhd"), HasSubstr("-f vpc -O qcow2 a.vhd a.qcow2"));
    EXPECT_THAT(remedy(with("\x1f\x8b\x08"), "a.qcow2.gz"), HasSubstr("gunzip -c a.qcow2.gz > a.qcow2"));
    EXPECT_THAT(remedy(with("\x1f\x8b\x08"), "a.img"), HasSubstr("gunzip -c a.img > a.img.unpacked"));
}

TEST(Foreign, RawDisksAreNone) {
    EXPECT_EQ(what(""), "");
    EXPECT_EQ(what("x"), "");
    EXPECT_EQ(what(std::string(disk_bytes, '\0')), "");
    EXPECT_EQ(what(std::string(disk_bytes, '\xff')), "");
    EXPECT_EQ(what(with("\xeb\x3c\x90mkfs.fat")), "");
    EXPECT_EQ(what(with("XFSB")), "");
    EXPECT_EQ(what(with("LABELONE", 512)), "");
    EXPECT_EQ(what(with("KDMV")), "");            // not a version of it
    EXPECT_EQ(what(with("conectix", -600)), "");  // not where it would be
    EXPECT_EQ(what(with("koly", -512)), "");
    EXPECT_EQ(what("hello, world\n"), "");
    // What boots, whatever its code begins with; but not what ends as something else.
    for (const auto& bytes : {"\x1f\x8b\x08"s, "BZh91AY&SY"s, "QED\0"s, "LUKS\xba\xbe\0\1"s, "<html>"s})
        EXPECT_EQ(what(with_boot_record(with(bytes))), "") << bytes;
    EXPECT_THAT(what(with_boot_record(with(vhd_footer, -512))), HasSubstr("VHD"));
    test::Random random(1);
    for (int i = 0; i < 1000; ++i) {
        std::string noise(foreign_head_bytes, '\0');
        for (char& c : noise) c = static_cast<char>(random.below(256));
        EXPECT_EQ(what(noise), "");
    }
}

TEST(LooksRaw, ZerosBootRecordsAndFileSystems) {
    const auto looks = [](const std::string& file) {
        const auto bytes = std::as_bytes(std::span(file));
        return looks_raw(bytes.first(std::min(bytes.size(), foreign_head_bytes)));
    };
    EXPECT_TRUE(looks(""));
    EXPECT_TRUE(looks(std::string(disk_bytes, '\0')));
    EXPECT_TRUE(looks(with_boot_record(with(""))));
    EXPECT_TRUE(looks(with("EFI PART", 512)));
    EXPECT_TRUE(looks(with("\x53\xef", 0x438)));
    EXPECT_TRUE(looks(with("XFSB")));
    EXPECT_TRUE(looks(with("LABELONE", 512)));
    EXPECT_FALSE(looks(with("")));
    EXPECT_FALSE(looks("404: Not Found"));
}

TEST(PromisesQcow2, IsAboutTheNameAlone) {
    EXPECT_TRUE(promises_qcow2("/srv/disk.qcow2"));
    EXPECT_TRUE(promises_qcow2("DISK.QCOW2"));
    EXPECT_FALSE(promises_qcow2("disk.img"));
    EXPECT_FALSE(promises_qcow2("qcow2"));
    EXPECT_FALSE(promises_qcow2("disk.qcow2.d/disk"));
}

}  // namespace
}  // namespace qcow::format
