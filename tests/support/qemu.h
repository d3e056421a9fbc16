#pragma once
// The peers that tests compare with: qemu-img and qemu-io.

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/subprocess.h"

namespace qcow::test {

using Arguments = std::vector<std::string>;

/// Runs qemu-img whatever comes of it.
Finished qemu_img(Arguments arguments, const std::filesystem::path& directory = {});

/// Runs qemu-img; failure is an exception.
Finished must_qemu_img(Arguments arguments, const std::filesystem::path& directory = {});

/// The secret of encrypted images.
inline constexpr std::string_view secret_of_tests = "x";

/// The arguments with which QEMU's programs open a qcow2 image.
Arguments qemu_image(const std::string& name, bool encrypted);

Arguments joined_arguments(Arguments first, const Arguments& second);

/// Checks the image.
Finished qemu_check(const std::string& name, bool encrypted, const std::filesystem::path& directory);

/// Compares what a guest sees with a raw file.
Finished qemu_compare_with_raw(const std::string& name, bool encrypted, const std::string& raw,
                               const std::filesystem::path& directory);

/// Makes an image that is encrypted with LUKS, with the secret "x". Tries again where QEMU cannot measure how long its
/// key derivation takes, which on a busy machine is often. `more_options` are those of -o.
void make_encrypted_image(const std::string& name, const std::string& size, const std::filesystem::path& directory = {},
                          const std::string& more_options = {});

nlohmann::json qemu_img_json(const Arguments& arguments, const std::filesystem::path& directory = {});

/// One session of commands on an image. A command that fails is an exception.
void must_qemu_io(const std::string& image, const std::string& format, const std::vector<std::string>& commands,
                  const std::filesystem::path& directory = {});
/// The same on a qcow2 image, which may be encrypted with secret_of_tests.
void must_qemu_io_on_qcow2(const std::string& image, bool encrypted, const std::vector<std::string>& commands,
                           const std::filesystem::path& directory = {});

/// The contents of an image, or of one of its snapshots, as a raw file.
void qemu_convert_to_raw(const std::string& image, const std::string& format, const std::string& target,
                         const std::string& snapshot = {}, const std::filesystem::path& directory = {});

}  // namespace qcow::test
