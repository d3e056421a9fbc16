#pragma once
// What each fuzzer does with one input. Also run over the committed corpora by the ordinary tests.

#include <cstddef>
#include <span>

namespace qcow::fuzz {

/// A few files as sparse_files.h has them: the first is opened as an image, the others are what it may name.
void run_image_input(std::span<const std::byte> input);

/// A guest's program as write_program.h has it, and the files that it is run on: the first is written as an image.
void run_write_input(std::span<const std::byte> input);

/// The parsers of format/: the first byte selects one.
void run_header_input(std::span<const std::byte> input);

/// The decoders of codec/, held against zlib and libzstd.
void run_codec_input(std::span<const std::byte> input);

/// What a client says to the NBD server; the first byte selects how far the handshake is, and how the bytes arrive.
void run_nbd_input(std::span<const std::byte> input);

/// Commands for an image that is in use, a line each.
void run_control_input(std::span<const std::byte> input);

/// The memory of a virtual machine with a ring of requests, or messages of its front end; the first byte selects one.
void run_guest_input(std::span<const std::byte> input);

}  // namespace qcow::fuzz
