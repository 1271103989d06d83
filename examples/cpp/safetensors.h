// Reading and writing safetensors: an 8-byte length, a JSON header, then the tensors' bytes.
#pragma once

#include <lemo/types.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace trainer {

// A tensor in a mapped file. `dtype` is one of LEMO_F32, LEMO_F16, LEMO_BF16.
struct StoredTensor {
  lemo_dtype dtype;
  std::vector<int64_t> shape;
  const unsigned char* data;
  std::string file;  // for error messages

  int64_t count() const;
  std::vector<float> floats() const;
};

// The tensors of one file, or of all files of a folder: model.safetensors, or the shards that
// model.safetensors.index.json names. Files are mapped, not read: a weight costs memory once it is used.
class Safetensors {
 public:
  static Safetensors open_file(const std::string& path);
  static Safetensors open_folder(const std::string& folder);

  bool contains(const std::string& name) const { return tensors_.count(name) != 0; }

  // Throws Error where the tensor is missing or has another shape.
  const StoredTensor& get(const std::string& name, const std::vector<int64_t>& shape) const;

  const std::map<std::string, StoredTensor>& all() const { return tensors_; }

 private:
  void add(const std::string& path);

  std::string where_;
  std::vector<std::shared_ptr<const void>> mappings_;
  std::map<std::string, StoredTensor> tensors_;
};

// A tensor to be written: float32 or int32.
struct NamedTensor {
  std::string name;
  lemo_dtype dtype;
  std::vector<int64_t> shape;
  const void* data;
};

// Writes the file and flushes it to the disk.
void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors);

// Writes and flushes; `parts` follow each other in the file.
struct Bytes {
  const void* data;
  size_t size;
};
void write_file(const std::string& path, const std::vector<Bytes>& parts);

// "[4096, 256]"
std::string shape_text(const std::vector<int64_t>& shape);

}  // namespace trainer
