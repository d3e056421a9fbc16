#include "qcow/text.h"

#include <gtest/gtest.h>

#include <string_view>

namespace qcow {
namespace {

using namespace std::string_view_literals;

TEST(Printable, KeepsOrdinaryText) {
    EXPECT_EQ(printable(""), "");
    EXPECT_EQ(printable("disk-1 (copy).qcow2 ~"), "disk-1 (copy).qcow2 ~");
}

TEST(Printable, KeepsUtf8OfEveryLength) {
    EXPECT_EQ(printable("\xc3\xa9"), "\xc3\xa9");                  // U+00E9
    EXPECT_EQ(printable("\xe7\xa3\x81"), "\xe7\xa3\x81");          // U+78C1
    EXPECT_EQ(printable("\xf0\x9f\x90\x84"), "\xf0\x9f\x90\x84");  // U+1F404
}

TEST(Printable, KeepsTheFirstAndLastCodePointOfEachLength) {
    EXPECT_EQ(printable("\x20\x7e"), "\x20\x7e");
    EXPECT_EQ(printable("\xc2\xa0\xdf\xbf"), "\xc2\xa0\xdf\xbf");                                  // U+00A0, U+07FF
    EXPECT_EQ(printable("\xe0\xa0\x80\xef\xbf\xbd"), "\xe0\xa0\x80\xef\xbf\xbd");                  // U+0800, U+FFFD
    EXPECT_EQ(printable("\xed\x9f\xbf\xee\x80\x80"), "\xed\x9f\xbf\xee\x80\x80");                  // around surrogates
    EXPECT_EQ(printable("\xf0\x90\x80\x80\xf4\x8f\xbf\xbd"), "\xf0\x90\x80\x80\xf4\x8f\xbf\xbd");  // U+10000, U+10FFFD
}

TEST(Printable, CanBeUndone) {
    for (const auto text : {"plain"sv, "a\tb\r\n"sv, "\xff\xfe"sv, "a\0b"sv, "\xc3\xa9"sv, ""sv})
        EXPECT_EQ(unprintable(printable(text)), text);
    for (const auto text : {"\\x"sv, "\\x1"sv, "\\xg1"sv, "\\x1g"sv, "\\x-1"sv, "\\y20"sv, "\\"sv})
        EXPECT_EQ(unprintable(text), text);
    EXPECT_EQ(unprintable("\\x4A\\x4b\\x"), "JK\\x");
}

TEST(Printable, KnowsUtf8) {
    EXPECT_TRUE(is_utf8(""));
    EXPECT_TRUE(is_utf8("a\n\xc3\xa9\xf0\x9f\x90\x84"));
    EXPECT_FALSE(is_utf8("a\xff"));
    EXPECT_FALSE(is_utf8("\xc3"));
}

TEST(Printable, EscapesAsciiControls) {
    EXPECT_EQ(printable("a\tb\r\n"), "a\\x09b\\x0d\\x0a");
    EXPECT_EQ(printable("\x1b[31m"), "\\x1b[31m");
    EXPECT_EQ(printable("\x7f"), "\\x7f");
    EXPECT_EQ(printable("a\0b"sv), "a\\x00b");
}

TEST(Printable, EscapesC1ControlsThoughTheyAreValidUtf8) {
    EXPECT_EQ(printable("\xc2\x80"), "\\xc2\\x80");
    EXPECT_EQ(printable("\xc2\x9b[31m"), "\\xc2\\x9b[31m");  // CSI
    EXPECT_EQ(printable("\xc2\x9f"), "\\xc2\\x9f");
}

TEST(Printable, EscapesWhatChangesTheDirectionOfWriting) {
    EXPECT_EQ(printable("a\u202egpj.exe"), "a\\xe2\\x80\\xaegpj.exe");
    EXPECT_EQ(printable("\u202a"), "\\xe2\\x80\\xaa");
    EXPECT_EQ(printable("\u2066\u2069"), "\\xe2\\x81\\xa6\\xe2\\x81\\xa9");
    EXPECT_EQ(printable("\u2029\u202f\u2065\u206a"), "\u2029\u202f\u2065\u206a");  // their neighbours
    EXPECT_EQ(printable("\u05d0\u0627"), "\u05d0\u0627");  // letters that are written from the right
}

TEST(Printable, LeavesOutTheEndOfWhatIsTooLong) {
    EXPECT_EQ(printable("abcd", 4), "abcd");
    EXPECT_EQ(printable("abcde", 4), "abcd...");
    EXPECT_EQ(printable("", 0), "");
    EXPECT_EQ(printable("a", 0), "...");
    // Neither a character nor an escape is cut.
    EXPECT_EQ(printable("abc\xc3\xa9", 4), "abc...");
    EXPECT_EQ(printable("\x01\x02", 7), "\\x01...");
}

TEST(Printable, EscapesBytesThatBeginNoSequence) {
    EXPECT_EQ(printable("\x80"), "\\x80");
    EXPECT_EQ(printable("\xff\xfe"), "\\xff\\xfe");
    EXPECT_EQ(printable("QFI\xfb"), "QFI\\xfb");
}

TEST(Printable, EscapesOverlongForms) {
    EXPECT_EQ(printable("\xc0\xaf"), "\\xc0\\xaf");  // '/'
    EXPECT_EQ(printable("\xc1\xbf"), "\\xc1\\xbf");
    EXPECT_EQ(printable("\xe0\x9f\xbf"), "\\xe0\\x9f\\xbf");
    EXPECT_EQ(printable("\xf0\x8f\xbf\xbf"), "\\xf0\\x8f\\xbf\\xbf");
}

TEST(Printable, EscapesSurrogatesAndWhatIsPastTheLastCodePoint) {
    EXPECT_EQ(printable("\xed\xa0\x80"), "\\xed\\xa0\\x80");
    EXPECT_EQ(printable("\xf4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");
    EXPECT_EQ(printable("\xf5\x80\x80\x80"), "\\xf5\\x80\\x80\\x80");
}

TEST(Printable, EscapesASequenceThatIsCutShort) {
    EXPECT_EQ(printable("\xc3"), "\\xc3");
    EXPECT_EQ(printable("\xe7\xa3"), "\\xe7\\xa3");
    EXPECT_EQ(printable("\xf0\x9f\x90"), "\\xf0\\x9f\\x90");
}

TEST(Printable, GoesOnAfterABadByte) {
    EXPECT_EQ(printable("\xc3\x28"), "\\xc3(");
    EXPECT_EQ(printable("\xe7\xc3\xa9"), "\\xe7\xc3\xa9");
}

}  // namespace
}  // namespace qcow
